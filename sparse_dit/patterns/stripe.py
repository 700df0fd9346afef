"""Parameterised stripes: offset, width and stride in time and in space.

The mask of Parameterized Stripe Attention (arXiv 2609.37001): a query at frame `t_q` and raster
position `s_q` of its frame sees the keys with
`|t_k - t_q - To| mod Ts <= Tw - 1` and `|s_k - s_q - So| mod Ss <= Sw - 1`.

| pattern | time | space |
|---|---|---|
| diagonal (band around the own position) | own frame, or all frames | a width, no stride |
| multi-diagonal (same place in every frame) | all | a width, no stride |
| spatial (own frame) | width 1 | all |
| temporal (every n-th frame) | width 1, stride n | all |
| grid | a stride | a stride |
"""

from __future__ import annotations

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from ..layout import Boxes, TileOrder
from .fields import CONFIG, Count, Offset

Place = tuple[Offset, Offset]


@dataclass(frozen=True, config=CONFIG)
class Stripe:
    """Six parameters; space is given as `(rows, columns)`, which makes it portable over widths.

    Args:
        time_width: Tw, frames; None for all frames.
        time_offset: To, frames.
        time_stride: Ts, frames; None for no repetition.
        space_width: Sw as `(rows, columns)`, `rows * width + columns >= 1`; None for all positions.
        space_offset: So as `(rows, columns)`.
        space_stride: Ss as `(rows, columns)`; None for no repetition.
    """

    time_width: Count | None = None
    time_offset: Offset = 0
    time_stride: Count | None = None
    space_width: Place | None = None
    space_offset: Place = (0, 0)
    space_stride: Place | None = None

    def covers(self, queries: Boxes, keys: Boxes, where: TileOrder) -> Tensor:
        """Whether a token of each query box sees one of each key box, bool `[Q, K]`."""
        result = torch.ones(len(queries), len(keys), dtype=torch.bool)
        if self.time_width is not None:
            lo = keys.lo[None, :, 0] - queries.hi[:, None, 0] - self.time_offset
            hi = keys.hi[None, :, 0] - queries.lo[:, None, 0] - self.time_offset
            result &= _hits(lo, hi, self.time_width, self.time_stride)
        if self.space_width is not None:
            result &= self._space(self.space_width, queries, keys, where.grid[2])
        return result

    def _space(self, reaches: Place, queries: Boxes, keys: Boxes, width: int) -> Tensor:
        """The raster distances between two boxes: one interval of columns for each row distance."""

        def positions(place: Place) -> int:
            return place[0] * width + place[1]

        stride = None if self.space_stride is None else max(1, positions(self.space_stride))
        reach = max(1, positions(reaches))
        low = keys.lo[None, :, 1] - queries.hi[:, None, 1]
        rows = keys.hi[None, :, 1] - queries.lo[:, None, 1] - low
        left = keys.lo[None, :, 2] - queries.hi[:, None, 2] - positions(self.space_offset)
        right = keys.hi[None, :, 2] - queries.lo[:, None, 2] - positions(self.space_offset)
        result = torch.zeros(low.shape, dtype=torch.bool)
        for row in range(int(rows.max()) + 1 if rows.numel() else 0):
            base = (low + row) * width
            result |= _hits(base + left, base + right, reach, stride) & (rows >= row)
        return result


def _hits(lo: Tensor, hi: Tensor, width: int, stride: int | None) -> Tensor:
    """Whether some int n in `lo..hi` has `|n| mod stride <= width - 1` (no stride: `|n|`)."""
    if stride is None:
        return (lo <= width - 1) & (hi >= 1 - width)

    def half(a: Tensor, b: Tensor) -> Tensor:
        first = a.clamp_min(0)
        step = (first + stride - 1) // stride * stride
        return (b >= first) & ((first % stride <= width - 1) | (step <= b))

    return half(lo, hi) | half(-hi, -lo)
