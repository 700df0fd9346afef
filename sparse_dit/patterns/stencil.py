"""Each tile sees the tiles at a fixed set of relative 3-D offsets.

Found by averaging a head's attention over query positions. It contains windows, multi-diagonals and
sliding tiles as shapes, and because it is geometry it moves to other sizes.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from ..layout import Boxes, TileOrder
from .fields import CONFIG, Count, Offset
from .lattice import any_inside, summed


@dataclass(frozen=True, config=CONFIG)
class Stencil:
    """Tile `t` sees tile `t + offset` for every offset of the set.

    Args:
        offsets: Runs of offsets in tiles: `(frames, rows, first column, number of columns)`.
    """

    offsets: tuple[tuple[Offset, Offset, Offset, Count], ...]

    @staticmethod
    def from_offsets(offsets: Tensor) -> Stencil:
        """From single offsets, int `[n, 3]` (frames, rows, columns), in any order."""
        places = np.asarray(offsets, dtype=np.int64).reshape(-1, 3)
        places = places[np.lexsort(places.T[::-1])]
        goes_on = (places[1:, :2] == places[:-1, :2]).all(1) & (np.diff(places[:, 2]) == 1)
        first = np.flatnonzero(np.append(True, ~goes_on)[: len(places)])
        count = np.diff(first, append=len(places))
        return Stencil(tuple(map(tuple, np.column_stack([places[first], count]).tolist())))

    def covers(self, queries: Boxes, keys: Boxes, where: TileOrder) -> Tensor:
        """Whether a token of each query box sees one of each key box, bool `[Q, K]`."""
        size = torch.tensor(where.tile)
        reach = tuple(-(-n // t) for n, t in zip(where.grid, where.tile, strict=True))
        members, table = _members(self.offsets, reach)
        shift = torch.tensor(reach) - 1
        q_lo, q_hi, k_lo, k_hi = (x // size for x in (queries.lo, queries.hi, keys.lo, keys.hi))
        lo = k_lo[None] - q_hi[:, None] + shift
        if torch.equal(q_lo, q_hi) and torch.equal(k_lo, k_hi):  # no box spans tiles: one offset
            return members[lo[..., 0], lo[..., 1], lo[..., 2]]
        return any_inside(table, lo, k_hi[None] - q_lo[:, None] + shift)


@functools.lru_cache(maxsize=256)
def _members(
    offsets: tuple[tuple[int, int, int, int], ...], reach: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """The offsets that a video of `reach` tiles can have: bool lattice, and summed."""
    members = torch.zeros([2 * n - 1 for n in reach], dtype=torch.bool)
    for frame, row, column, count in offsets:
        if abs(frame) < reach[0] and abs(row) < reach[1]:
            start = max(0, column + reach[2] - 1)
            stop = max(start, column + count + reach[2] - 1)
            members[frame + reach[0] - 1, row + reach[1] - 1, start:stop] = True
    return members, summed(members)
