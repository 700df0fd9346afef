"""Each tile sees the tiles at a fixed set of relative 3-D offsets.

Found by averaging a head's attention over query positions. It contains windows, multi-diagonals and
sliding tiles as shapes, and because it is geometry it moves to other sizes: in a longer or larger video than
the one it was found in, what holds at the greatest distance that was seen holds beyond it.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from ..layout import Boxes, TileOrder
from .fields import CONFIG, Count, Distance, Offset
from .lattice import any_inside, summed


@dataclass(frozen=True, config=CONFIG)
class Stencil:
    """Tile `t` sees tile `t + offset` for every offset of the set.

    Args:
        offsets: Runs of offsets in tiles: `(frames, rows, first column, number of columns)`.
        reach: The greatest distances, in tiles, that were looked at: an offset at one of them stands for all
            beyond it on that side. None: there is nothing beyond the offsets.
    """

    offsets: tuple[tuple[Offset, Offset, Offset, Count], ...]
    reach: tuple[Distance, Distance, Distance] | None = None

    def __post_init__(self) -> None:
        if self.reach is None:
            return
        runs = np.array(self.offsets, dtype=np.int64).reshape(-1, 4)
        last = runs[:, 2] + runs[:, 3] - 1
        beyond = (np.abs(runs[:, :3]) > self.reach).any(1) | (np.abs(last) > self.reach[2])
        if beyond.any():
            raise ValueError(
                f"a stencil's offsets must lie within its reach {list(self.reach)}, "
                f"got {runs[beyond][0].tolist()}"
            )

    @staticmethod
    def from_offsets(offsets: Tensor, reach: tuple[int, int, int] | None = None) -> Stencil:
        """From single offsets, int `[n, 3]` (frames, rows, columns), in any order; see `Stencil`."""
        places = np.asarray(offsets, dtype=np.int64).reshape(-1, 3)
        places = places[np.lexsort(places.T[::-1])]
        goes_on = (places[1:, :2] == places[:-1, :2]).all(1) & (np.diff(places[:, 2]) == 1)
        first = np.flatnonzero(np.append(True, ~goes_on)[: len(places)])
        count = np.diff(first, append=len(places))
        return Stencil(tuple(map(tuple, np.column_stack([places[first], count]).tolist())), reach)

    def members(self, counts: tuple[int, int, int]) -> Tensor:
        """The offsets that a video of `counts` tiles can have, bool, a lattice around offset 0."""
        return _members(self.offsets, self.reach, counts)[0]

    def covers(self, queries: Boxes, keys: Boxes, where: TileOrder) -> Tensor:
        """Whether a token of each query box sees one of each key box, bool `[Q, K]`."""
        size = torch.tensor(where.tile)
        counts = tuple(-(-n // t) for n, t in zip(where.grid, where.tile, strict=True))
        members, table = _members(self.offsets, self.reach, counts)
        shift = torch.tensor(counts) - 1
        q_lo, q_hi, k_lo, k_hi = (x // size for x in (queries.lo, queries.hi, keys.lo, keys.hi))
        lo = k_lo[None] - q_hi[:, None] + shift
        if torch.equal(q_lo, q_hi) and torch.equal(k_lo, k_hi):  # no box spans tiles: one offset
            return members[lo[..., 0], lo[..., 1], lo[..., 2]]
        return any_inside(table, lo, k_hi[None] - q_lo[:, None] + shift)


@functools.lru_cache(maxsize=256)
def _members(
    offsets: tuple[tuple[int, int, int, int], ...],
    reach: tuple[int, int, int] | None,
    counts: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:
    """The offsets that a video of `counts` tiles can have: bool lattice, and summed."""
    # no further than both the video and what was looked at
    far = [
        n - 1 if r is None else min(n - 1, r)
        for n, r in zip(counts, reach or [None] * 3, strict=True)
    ]
    members = torch.zeros([2 * n + 1 for n in far], dtype=torch.bool)
    for frame, row, column, count in offsets:
        if abs(frame) <= far[0] and abs(row) <= far[1]:
            start = max(0, column + far[2])
            stop = max(start, column + count + far[2])
            members[frame + far[0], row + far[1], start:stop] = True
    for axis, (count, most) in enumerate(zip(counts, far, strict=True)):
        places = torch.arange(1 - count, count).clamp(-most, most) + most
        members = members.index_select(axis, places)
    return members, summed(members)
