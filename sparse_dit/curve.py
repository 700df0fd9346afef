"""Generalised Hilbert curves: token orders in which neighbours on the line are neighbours in the video.

The construction for grids of any size is Jakub Cerveny's, https://github.com/jakubcerveny/gilbert; Jenga
(https://arxiv.org/abs/2505.16864) orders video tokens by such a curve. A curve through a grid of even
sizes steps to a direct neighbour always. One through a frame of odd length and even breadth has one
diagonal step; one through a whole video of odd sizes may have several.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from .on_cpu import on_cpu

Size = Annotated[int, Field(strict=True, ge=1, le=1 << 16)] | None
Grid = tuple[int, int, int]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Curve:
    """Tokens ordered along a curve, in place of 3-D tiles; shapes then see the video unrolled along it.

    An unrolled video has one row, and its columns are places on the curve: a window of columns is a band
    along the curve, a stencil has offsets in stretches of it. It is drawn anew at every size.

    Args:
        curve: `"frame"`: through the rows and columns of a frame, the same in all of them, which stay
            frames; `"video"`: one through frames, rows and columns, after which there is one frame.
        tokens: Tiles are stretches of this many places on the curve; None for the whole curve.
        frames: Frames of a tile, None for all of them; with `"video"` it must be 1.

    Raises:
        ValueError: If a parameter is out of range.
    """

    curve: Literal["frame", "video"]
    tokens: Size = 64
    frames: Size = 1

    def __post_init__(self) -> None:
        if self.curve == "video" and self.frames != 1:
            raise ValueError(f"frames must be 1 for a curve through the video, got {self.frames}")

    @property
    def tile(self) -> tuple[int | None, int | None, int | None]:
        """Size of the tiles in the unrolled video."""
        return (self.frames, 1, self.tokens)

    def unrolled(self, grid: Grid) -> Grid:
        """The grid that shapes see."""
        frames, height, width = grid
        whole = self.curve == "video"
        return (1, 1, frames * height * width) if whole else (frames, 1, height * width)

    def unroll(self, coordinates: Tensor, grid: Grid) -> Tensor:
        """Frames, rows and columns int64 `[n, 3]` of a video of size `grid` as those of it unrolled."""
        _, height, width = grid
        frame, flat = coordinates[:, 0], coordinates[:, 1] * width + coordinates[:, 2]
        if self.curve == "video":
            frame, flat = torch.zeros_like(frame), frame * (height * width) + flat
        rank = _rank(grid if self.curve == "video" else (1, height, width))
        return torch.stack([frame, torch.zeros_like(frame), rank[flat]], 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; what is at its default is left out."""
        data: dict[str, Any] = {"curve": self.curve}
        data |= {"tokens": self.tokens} if self.tokens != 64 else {}
        return data | ({"frames": self.frames} if self.frames != 1 else {})

    def __str__(self) -> str:
        frames, _, tokens = ("all" if n is None else str(n) for n in self.tile)
        return f"{self.curve}-curve-{frames}x{tokens}"


@functools.lru_cache(maxsize=32)
@on_cpu
def _rank(grid: Grid) -> Tensor:
    """int64 `[n]`: the place on the curve of each token in raster order."""
    path = curve_path(grid)
    rank = torch.empty_like(path)
    rank[path] = torch.arange(len(path))
    return rank


@on_cpu
def curve_path(grid: Grid) -> Tensor:
    """Raster numbers of a grid's tokens along its curve, int64 `[frames * height * width]`.

    It starts at the first token and ends at the other end of the longest axis. A frame is a grid of one
    frame. It takes about 3 us a token.

    Raises:
        ValueError: If a size is below 1.
    """
    if min(grid) < 1:
        raise ValueError(f"a curve's grid must have sizes >= 1, got {grid}")
    strides = (grid[1] * grid[2], grid[2], 1)
    axes = sorted(range(3), key=lambda axis: (-grid[axis], -axis))
    path: list[int] = []
    a, b, c = (_Side(strides[axis], grid[axis]) for axis in axes)
    _walk(path, 0, a, b, c)
    return torch.tensor(path)


class _Side:
    """A side of a cuboid: raster numbers from one token to the next, and how many; below 0 is backwards."""

    __slots__ = ("length", "stride")

    def __init__(self, stride: int, length: int) -> None:
        self.stride, self.length = stride, length

    @property
    def step(self) -> int:
        return self.stride * ((self.length > 0) - (self.length < 0))

    @property
    def span(self) -> int:
        return self.stride * self.length

    def __neg__(self) -> _Side:
        return _Side(self.stride, -self.length)

    def halves(self) -> tuple[_Side, _Side]:
        """Two parts, the first of an even length where it can be."""
        half = self.length // 2
        if half % 2 and abs(self.length) > 2:
            half += 1 if self.length > 0 else -1
        return _Side(self.stride, half), _Side(self.stride, self.length - half)


def _walk(path: list[int], start: int, a: _Side, b: _Side, c: _Side) -> None:
    """Through a cuboid from `start` to the end of side `a`."""
    w, h, d = abs(a.length), abs(b.length), abs(c.length)
    if 0 in (w, h, d):
        return
    if (w, h, d).count(1) >= 2:
        line = max((a, b, c), key=lambda side: abs(side.length))
        path.extend(start + n * line.step for n in range(abs(line.length)))
        return
    if 2 * w > 3 * h and 2 * w > 3 * d:
        near, rest = a.halves()
        _walk(path, start, near, b, c)
        _walk(path, start + near.span, rest, b, c)
    elif 3 * h > 4 * d:
        _hook(path, start, a, b, c)
    elif 3 * d > 4 * h:
        near, rest = c.halves()
        half, other = a.halves()
        _walk(path, start, near, half, b)
        _walk(path, start + near.span, a, b, rest)
        end = start + a.span - a.step + near.span - near.step
        _walk(path, end, -near, -other, b)
    else:
        _coil(path, start, a, b, c)


def _hook(path: list[int], start: int, a: _Side, b: _Side, c: _Side) -> None:
    """Out along `b`, along `a`, and back: side `c` is not split."""
    near, rest = b.halves()
    half, other = a.halves()
    _walk(path, start, near, c, half)
    _walk(path, start + near.span, a, rest, c)
    _walk(path, start + a.span - a.step + near.span - near.step, -near, c, -other)


def _coil(path: list[int], start: int, a: _Side, b: _Side, c: _Side) -> None:
    """All three sides split: five parts."""
    half, other = a.halves()
    near, rest = b.halves()
    low, high = c.halves()
    far_c, end_a, end_b = c.span - c.step, a.span - a.step, near.span - near.step
    _walk(path, start, near, low, half)
    _walk(path, start + near.span, c, half, rest)
    _walk(path, start + end_b + far_c, a, -near, -high)
    _walk(path, start + end_a + near.span + far_c, -c, -other, rest)
    _walk(path, start + end_a + end_b, -near, low, -other)
