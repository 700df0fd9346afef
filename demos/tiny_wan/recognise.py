"""Read a video back into the words of its prompt, by fixed rules and without a network.

Every pixel goes to the nearest paint of the palette. The commonest object paint is the object; its
mask gives the shape (best overlap with a drawn template of the same area and centre) and the
motion (drift of its centre); the rest of the picture gives the background. On really drawn clips
the rules are nearly always right (`measure.py` prints how often): that is the ceiling of a score.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_dit.eval.draw import COLORS, GROUNDS, MOTIONS, SHAPES, Scene, shape_distance

_LEAST_AREA = 0.005  # of the picture: less is no object
_LEAST_DRIFT = 0.05  # of the shorter side, over the clip: less is no motion
_PLAIN_CONTRAST = 0.12  # standard deviation between a ground's dark (0) and light (1) shade
_PLANE_FIT = 0.75  # share of the variance that a plane explains: more is a gradient
_ONE_DIRECTION = 0.5  # coherence of the slopes: more is stripes


@dataclass(frozen=True)
class Reading:
    """What was recognised; a word is "none" where nothing was. `fit` is the template's overlap."""

    scene: Scene
    fit: float


def read_video(video: Tensor) -> Reading:
    """Recognise a video of shape `[3, T, H, W]` in -1..1."""
    paint, shade = _nearest_paint((video.float() + 1) / 2)  # [T, H, W] both
    counts = torch.stack([(paint == i).sum() for i in range(len(COLORS))])
    grounds = torch.stack([(paint == len(COLORS) + i).sum() for i in range(len(GROUNDS))])
    ground = tuple(GROUNDS)[int(grounds.argmax())]
    texture = _texture(shade, paint >= len(COLORS))
    found = int(counts.argmax())
    if counts[found] < _LEAST_AREA * paint.numel():
        return Reading(Scene("none", "none", "none", ground, texture), 0.0)
    mask = paint == found
    mask = mask[mask.flatten(1).float().mean(1) >= _LEAST_AREA]  # frames that show it
    if len(mask) == 0:
        return Reading(Scene("none", "none", "none", ground, texture), 0.0)
    fits = {shape: _overlap(mask, shape) for shape in SHAPES}
    shape = max(fits, key=fits.__getitem__)
    scene = Scene(tuple(COLORS)[found], shape, _motion(mask), ground, texture)
    return Reading(scene, fits[shape])


def _nearest_paint(rgb: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest paint (colours, then grounds) and the place on its ramp, `[T, H, W]`.

    An object's paint is a ramp down to its rim, a ground's from its dark to its light shade.
    """
    colors, grounds = torch.tensor(list(COLORS.values())), torch.tensor(list(GROUNDS.values()))
    low = torch.cat([0.75 * colors, 0.5 * grounds])
    high = torch.cat([colors, (1.45 * grounds + 0.08).clamp(0, 1)])
    pixels = rgb.flatten(1).mT.unsqueeze(1)  # [N, 1, 3]
    ramp = high - low
    place = ((pixels - low) * ramp).sum(-1) / ramp.square().sum(-1)  # [N, P]
    place = place.clamp(0, 1)
    distance = (pixels - low - place.unsqueeze(-1) * ramp).square().sum(-1)
    nearest = distance.argmin(1)
    shade = place.gather(1, nearest[:, None])
    return nearest.view(rgb.shape[1:]), shade.view(rgb.shape[1:])


def _center(mask: Tensor) -> Tensor:
    """Centres `[T, 2]` (x, y) of masks `[T, H, W]`."""
    weight = mask.float()
    area = weight.sum((1, 2)).clamp_min(1)
    x = torch.arange(mask.shape[2]) + 0.5
    y = torch.arange(mask.shape[1]) + 0.5
    return torch.stack([weight.sum(1) @ x / area, weight.sum(2) @ y / area], 1)


def _motion(mask: Tensor) -> str:
    center = _center(mask)
    time = torch.linspace(-0.5, 0.5, len(center)) if len(center) > 1 else torch.zeros(1)
    drift = (time @ center) / time.square().sum().clamp_min(1e-9)  # pixels over the clip
    if drift.abs().max() < _LEAST_DRIFT * min(mask.shape[1:]):
        return "none"
    left, right, up, down = MOTIONS
    if drift[0].abs() > drift[1].abs():
        return right if drift[0] > 0 else left
    return down if drift[1] > 0 else up


@functools.cache
def _template(shape: str) -> tuple[float, float]:
    """Area and height of the centroid of a shape of radius 1."""
    axis = torch.linspace(-1.5, 1.5, 601)
    inside = (shape_distance(shape, axis.view(1, -1), axis.view(-1, 1), 1.0) < 0).float()
    area = inside.sum() * 0.005**2
    return float(area), float((inside.sum(1) @ axis) / inside.sum())


def _overlap(mask: Tensor, shape: str) -> float:
    """Mean over the frames of intersection over union with a template of equal area and centre."""
    area, centroid = _template(shape)
    center = _center(mask)
    total = 0.0
    for frame, (x, y) in zip(mask, center.tolist(), strict=True):
        radius = (float(frame.sum()) / area) ** 0.5
        column = torch.arange(mask.shape[2]).view(1, -1) + 0.5 - x
        row = torch.arange(mask.shape[1]).view(-1, 1) + 0.5 - y + centroid * radius
        drawn = shape_distance(shape, column, row, radius) < 0
        total += float((drawn & frame).sum() / (drawn | frame).sum())
    return total / len(mask)


def _texture(shade: Tensor, ground: Tensor) -> str:
    """Name of the pattern in the shades `[T, H, W]`, seen where `ground` is set."""
    seen = ground.float().sum(0)
    picture = (shade * ground).sum(0) / seen.clamp_min(1)  # [H, W], the object averaged away
    known = seen >= max(1, 0.3 * len(ground))
    values = picture[known]
    if len(values) < 16 or values.std() < _PLAIN_CONTRAST:
        return "plain"
    row, column = known.nonzero(as_tuple=True)
    plane = torch.stack([row, column, torch.ones_like(row)], 1).float()
    rest = values - plane @ torch.linalg.lstsq(plane, values.unsqueeze(1)).solution[:, 0]
    if 1 - rest.var() / values.var() > _PLANE_FIT:
        return "gradient"
    smooth = F.avg_pool2d(picture[None, None], 3, 1, 1)[0, 0]
    dy = (smooth[2:, 1:-1] - smooth[:-2, 1:-1])[known[1:-1, 1:-1]]
    dx = (smooth[1:-1, 2:] - smooth[1:-1, :-2])[known[1:-1, 1:-1]]
    a, b, c = dx.square().sum(), dy.square().sum(), (dx * dy).sum()
    coherence = torch.sqrt((a - b) ** 2 + 4 * c * c) / (a + b).clamp_min(1e-9)
    return "stripes" if coherence > _ONE_DIRECTION else "checks"
