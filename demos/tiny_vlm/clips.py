"""Drawn clips with known content: every picture shows one coloured shape that moves, one picture is framed.

A picture is the two frames that a temporal patch of Qwen2.5-VL holds. Its shape is of one colour, moves
one step between the two frames, and stands anywhere on noisy grey; it is as large, in pixels, in a large
picture as in a small one. One picture of a clip has a white border: the questions are about that one.

Letters in shapes: B clips, T pictures in a clip, S height and width in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

PIXELS_PER_TOKEN = 8  # a side of what becomes one token: 2 x 2 patches of 4 x 4 pixels
COLOURS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 0.8, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "magenta": (1.0, 0.0, 1.0),
    "cyan": (0.0, 1.0, 1.0),
    "orange": (1.0, 0.5, 0.0),
    "black": (0.0, 0.0, 0.0),
}
SHAPES = ("square", "cross", "ring", "triangle")
MOTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # rows, columns
STEP = 3.0  # pixels between the two frames
_REACH = 5.0  # pixels from a shape's centre to its farthest edge, at most


@dataclass(frozen=True)
class Clips:
    """Pixels `[B, T, 2, 3, S, S]` in 0..1, and what each picture shows, as numbers `[B, T]`.

    `framed` `[B]` is the number of the picture with the white border.
    """

    pixels: Tensor
    colour: Tensor
    shape: Tensor
    motion: Tensor
    framed: Tensor


def draw_clips(batch: int, pictures: int, side: int, generator: Generator) -> Clips:
    """Clips of `pictures` pictures of `side x side` tokens; the generator alone decides on them."""
    size, each = side * PIXELS_PER_TOKEN, (batch, pictures)

    def choice(count: int) -> Tensor:
        return torch.randint(count, each, generator=generator)

    def uniform(*more: int) -> Tensor:
        return torch.rand(*each, *more, generator=generator)

    colour, shape, motion = choice(len(COLOURS)), choice(len(SHAPES)), choice(len(MOTIONS))
    framed = torch.randint(pictures, (batch,), generator=generator)
    way = torch.tensor(list(MOTIONS.values()), dtype=torch.float32)[motion]  # [B, T, 2]
    margin = _REACH + 1 + STEP / 2 * way.abs()
    middle = margin + uniform(2) * (size - 2 * margin)
    centre = torch.stack([middle - STEP / 2 * way, middle + STEP / 2 * way], 2)  # [B, T, 2, 2]
    pixel = torch.arange(size) + 0.5
    y = pixel[:, None] - centre[..., 0, None, None]  # [B, T, 2, S, 1]
    x = pixel - centre[..., 1, None, None]
    inside = _inside(shape[..., None, None, None], x, y, 4 + uniform()[..., None, None, None])
    grey = 0.3 + 0.3 * uniform()[..., None, None, None, None]
    ground = grey + 0.05 * torch.randn(*each, 2, 3, size, size, generator=generator)
    paint = torch.tensor(list(COLOURS.values()))[colour][:, :, None, :, None, None]
    pixels = torch.where(inside.unsqueeze(3), paint, ground)
    edge = (pixel < 1) | (pixel > size - 1)
    border = F.one_hot(framed, pictures).bool()[..., None, None, None, None] & (
        edge | edge[:, None]
    )
    return Clips(torch.where(border, 1.0, pixels), colour, shape, motion, framed)


def _inside(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Which pixels, at `x`, `y` from the centre, belong to the shape."""
    far = torch.maximum(x.abs(), y.abs())
    distance = (x * x + y * y).sqrt()
    drawn = (
        far < 0.9 * radius,
        (far < radius) & (torch.minimum(x.abs(), y.abs()) < 0.35 * radius),
        (distance < radius) & (distance > 0.55 * radius),
        (y.abs() < radius) & (x.abs() < (y + radius) / 2),
    )
    return torch.stack([part & (shape == number) for number, part in enumerate(drawn)]).any(0)
