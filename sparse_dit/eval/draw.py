"""Drawn videos with prompts: one coloured shape moves over a textured background.

The embedded model is trained on these clips, and quality reports use them as real video whose
content is known. Everything follows from one `random.Random`, so a seed gives the same clip.

Letters in shapes: T frames, H height, W width, all in pixels.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import astuple, dataclass
from random import Random

import torch
from torch import Tensor

RGB = tuple[float, float, float]

COLORS: dict[str, RGB] = {
    "red": (0.92, 0.12, 0.12),
    "green": (0.12, 0.75, 0.20),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.97, 0.88, 0.10),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("left", "right", "up", "down")
GROUNDS: dict[str, RGB] = {
    "gray": (0.42, 0.42, 0.42),
    "brown": (0.42, 0.27, 0.15),
    "navy": (0.10, 0.14, 0.36),
    "purple": (0.32, 0.14, 0.40),
}
TEXTURES = ("plain", "stripes", "checks", "gradient")

_PROMPT = re.compile(r"a (\w+) (\w+) moves (\w+) over (\w+) (\w+)")


@dataclass(frozen=True)
class Scene:
    """What a prompt says. `prompt` and `parse_prompt` are each other's inverse."""

    color: str
    shape: str
    motion: str
    ground: str
    texture: str

    @property
    def prompt(self) -> str:
        return f"a {self.color} {self.shape} moves {self.motion} over {self.ground} {self.texture}"


def parse_prompt(prompt: str) -> Scene:
    """The scene that a prompt describes; raises ValueError if it is not of the drawn form."""
    match = _PROMPT.fullmatch(prompt.strip().lower().rstrip("."))
    if match is None:
        raise ValueError(
            "expected 'a COLOR SHAPE moves MOTION over GROUND TEXTURE', as in "
            f"'a red circle moves left over gray plain', got {prompt!r}"
        )
    scene = Scene(*match.groups())
    words = zip(("color", "shape", "motion", "ground", "texture"), astuple(scene), strict=True)
    for (name, word), known in zip(words, _VOCABULARY, strict=True):
        if word not in known:
            raise ValueError(f"unknown {name} {word!r}; expected one of {sorted(known)}")
    return scene


_VOCABULARY = (tuple(COLORS), SHAPES, MOTIONS, tuple(GROUNDS), TEXTURES)


def all_prompts() -> list[str]:
    """Every prompt, 768 of them, in a fixed order."""
    return [Scene(*words).prompt for words in itertools.product(*_VOCABULARY)]


def sample_prompt(rng: Random) -> str:
    """One prompt, all equally likely."""
    return Scene(*(rng.choice(words) for words in _VOCABULARY)).prompt


def draw(frames: int, height: int, width: int, rng: Random) -> tuple[Tensor, str]:
    """A clip of a random prompt.

    Args:
        frames: Number of frames T.
        height: Pixels; any number, the object scales with the shorter side.
        width: Pixels.
        rng: Source of all that is random; its state advances.

    Returns:
        Video of shape `[3, T, H, W]`, float32 in -1..1, and its prompt.
    """
    prompt = sample_prompt(rng)
    return draw_prompt(prompt, frames, height, width, rng), prompt


def draw_prompt(prompt: str, frames: int, height: int, width: int, rng: Random) -> Tensor:
    """A clip of the given prompt, float32 of shape `[3, T, H, W]` in -1..1.

    The prompt leaves open, and `rng` decides: the object's size, speed and place, and the
    background's period, angle and phase.
    """
    if min(frames, height, width) < 1:
        raise ValueError(f"the size must be positive, got {frames} x {height} x {width}")
    scene = parse_prompt(prompt)
    base = torch.tensor(GROUNDS[scene.ground]).view(3, 1, 1)
    light, dark = (base * 1.45 + 0.08).clamp(0, 1), base * 0.5
    weight = _texture(scene.texture, height, width, rng)  # [H, W]
    ground = dark + (light - dark) * weight  # [3, H, W]

    radius = (0.17 + 0.09 * rng.random()) * min(height, width)
    center = _path(scene.motion, frames, height, width, radius, rng)  # [T, 2]
    y, x = _pixel_centers(height, width)
    distance = shape_distance(
        scene.shape, x - center[:, 0].view(-1, 1, 1), y - center[:, 1].view(-1, 1, 1), radius
    )  # [T, H, W]
    cover = torch.sigmoid(distance * -2.2)  # anti-aliased over about two pixels
    rim = 1 - 0.25 * torch.sigmoid((distance + 2.5) * 2)
    paint = torch.tensor(COLORS[scene.color]).view(3, 1, 1, 1)
    video = torch.lerp(ground.unsqueeze(1), paint * rim, cover)  # [3, T, H, W]
    return video * 2 - 1


def shape_distance(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Signed distance to the outline, negative inside; `x`, `y` are relative to the centre."""
    if shape == "circle":
        return torch.sqrt(x * x + y * y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.85 * radius
    if shape == "triangle":
        return torch.maximum(y - 0.6 * radius, x.abs() * math.sqrt(0.75) - y * 0.5 - 0.55 * radius)
    raise ValueError(f"unknown shape {shape!r}; expected one of {SHAPES}")


def _pixel_centers(height: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.arange(height).view(-1, 1) + 0.5, torch.arange(width).view(1, -1) + 0.5


def _path(motion: str, frames: int, height: int, width: int, radius: float, rng: Random) -> Tensor:
    """Centres `[T, 2]` (x, y) of a straight, even movement that stays in the picture."""
    along, across = (width, height) if motion in ("left", "right") else (height, width)
    speed = (0.02 + 0.025 * rng.random()) * min(height, width)
    low, high = 0.8 * radius, along - 0.8 * radius
    length = min(speed * (frames - 1), high - low)
    start = low + rng.random() * (high - low - length)
    moving = start + length * torch.arange(frames) / max(frames - 1, 1)
    if motion in ("left", "up"):
        moving = along - moving
    still = torch.full((frames,), radius + rng.random() * max(across - 2 * radius, 1.0))
    pair = (moving, still) if motion in ("left", "right") else (still, moving)
    return torch.stack(pair, 1)


def _texture(texture: str, height: int, width: int, rng: Random) -> Tensor:
    """Weight `[H, W]` in 0..1 between the dark and the light shade of the background."""
    y, x = _pixel_centers(height, width)
    period = 12 + 14 * rng.random()
    turn, shift = 2 * math.pi * rng.random(), 2 * math.pi * rng.random()
    if texture == "plain":
        return torch.full((height, width), 0.5)
    if texture == "stripes":
        angle = rng.choice((0.0, math.pi / 2, math.pi / 4, -math.pi / 4))
        wave = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period)
        return torch.sigmoid(4 * torch.sin(wave + shift))
    if texture == "checks":
        step = 2 * math.pi / (1.3 * period)
        return torch.sigmoid(7 * torch.sin(x * step + turn) * torch.sin(y * step + shift))
    slope = (x - width / 2) * math.cos(turn) + (y - height / 2) * math.sin(turn)
    return torch.sigmoid(slope * (2.5 / (0.6 * max(height, width))))
