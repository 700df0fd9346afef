"""Blocks at one size of tiles and steps, before any are chosen: made once on the host for a layout, and kept.

Every block of keys is cut into pieces of a step. Whole ones, and those of most of a step, are a step of their
own each. The keys of smaller ones are packed into steps by the list, unless that would take too much memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ...layout import cut_offsets
from ...on_cpu import on_cpu
from .chosen import Places
from .config import Config
from .tables import ranks

MOST = 0.75  # of a step: pieces of more keys are a step of their own
PACKED = 6144  # keys of small pieces; their lists take 3/4 of the memory of 128 channels of k and v


@dataclass(frozen=True, eq=False)
class Grid:
    """Blocks at one size of tiles and steps, int32 on the device.

    Letters: T tiles, P pieces that are steps of their own, S keys of small pieces, C pooled keys.

    Args:
        q_tokens: `[N]`, the token at each sorted position.
        keys: `[P * block_n]`, key tokens of pieces, -1 where there is none.
        positions: The sorted positions of these keys.
        piece_block, piece_keys, piece_last: `[P]`: the block of each, -1 for global tokens; its keys, and the
            largest of their tokens. Whole ones come first, sorted by that, so that those of a list are too.
        small_block, small_tokens: `[S]`: the block and token of each.
        cell_block, cell_offsets: `[C]` and `[C + 1]`; empty without a far field.
        cell_steps: First places of steps over pooled keys, of all lists; at least one.
        tile_rows: `[T, 3]`: first row, rows and group of each tile, in the order of lists.
        tile_start: `[lists + 1]`: the first tile of each list; the last list is of rows that see everything.
        blocks, whole: How many blocks, and whole pieces.
    """

    q_tokens: Tensor
    keys: Tensor
    positions: Tensor
    piece_block: Tensor
    piece_keys: Tensor
    piece_last: Tensor
    small_block: Tensor
    small_tokens: Tensor
    cell_block: Tensor
    cell_offsets: Tensor
    cell_steps: Tensor
    tile_rows: Tensor
    tile_start: Tensor
    blocks: int
    whole: int
    block_n: int

    @property
    def lists(self) -> int:
        """A list for each block of queries, and one for rows that see everything, if there are any."""
        return len(self.tile_start) - 1

    def has_partial(self, intervals: bool) -> bool:
        """Whether many steps may be masked: those of fewer keys, and, if rows have intervals, packed ones."""
        return len(self.piece_block) > self.whole or (intervals and self.most_small > 0)

    @property
    def most_small(self) -> int:
        """Places of a list for the keys of small pieces."""
        return padded(len(self.small_block), self.block_n)

    @property
    def most_steps(self) -> int:
        """Steps of a list."""
        return max(1, len(self.piece_block) + self.most_small // self.block_n)

    @property
    def most_cells(self) -> int:
        """Places of a list for pooled keys."""
        return padded(len(self.cell_block), self.block_n)


@functools.lru_cache(maxsize=256)
@on_cpu
def grid_of(places: Places, config: Config, by_group: bool, device: torch.device) -> Grid:
    """The tables of blocks that no choice changes.

    Args:
        places: Where they lie.
        config: Rows of a tile and keys of a step.
        by_group: As in `tables_of`.
        device: The device of the tables.
    """
    n, block_n, bounds = len(places.tokens), config.block_n, places.bounds
    first, end = int(bounds[0]), int(bounds[-1])
    ends = [0] * (first > 0) + bounds.tolist() + [n] * (n > end)
    cuts = cut_offsets(torch.tensor(ends), block_n)
    start, size = cuts[:-1], cuts.diff()
    block = torch.searchsorted(bounds, start, right=True) - 1
    block[(start < first) | (start >= end)] = -1
    small = size < MOST * block_n
    if by_group or int(size[small].sum()) > PACKED:
        small = torch.zeros_like(small)
    within = _positions(start, size, block_n)
    last = torch.where(within < 0, -1, places.tokens[within.clamp_min(0)]).amax(1)
    order = torch.where(size < block_n, n, last).argsort(stable=True)
    own, few = order[~small[order]], small.nonzero()[:, 0]
    positions = within[own].flatten()
    keys = torch.where(positions < 0, -1, places.tokens[positions.clamp_min(0)])
    which, rank = ranks(size[few])
    of = few[which]
    pools = bounds[:0] if places.pools is None else places.pools
    rows, starts = _tiles(places, config.block_m, by_group)
    steps = (len(starts) - 1) * -(-max(0, len(pools) - 1) // block_n)
    tables = [
        places.tokens, keys, positions, block[own], size[own], last[own], block[of],
        places.tokens[start[of] + rank], torch.searchsorted(bounds, pools[:-1], right=True) - 1, pools,
        torch.arange(max(1, steps)) * block_n, rows, starts,
    ]  # fmt: skip
    moved = (table.int().contiguous().to(device) for table in tables)
    return Grid(
        *moved, blocks=len(bounds) - 1, whole=int((size[own] == block_n).sum()), block_n=block_n
    )


def _positions(start: Tensor, size: Tensor, block_n: int) -> Tensor:
    """Sorted positions in pieces of at most `block_n`, `[pieces, block_n]`; -1 where there is none."""
    positions = start[:, None] + torch.arange(block_n)
    return torch.where(positions < (start + size)[:, None], positions, -1)


def _tiles(places: Places, block_m: int, by_group: bool) -> tuple[Tensor, Tensor]:
    """First row, rows and group of each tile, `[T, 3]`, by list; where each list's begin."""
    offsets, count = places.q_offsets, len(places.bounds) - 1
    owner = torch.where(places.owner < 0, count, places.owner)
    fresh = torch.ones(len(owner), dtype=torch.bool)
    if not by_group:
        fresh[1:] = owner[1:] != owner[:-1]
    first = fresh.nonzero()[:, 0]
    start = offsets[first]
    end = torch.cat([start[1:], offsets[-1:]])
    parts = (end - start + block_m - 1) // block_m
    of = torch.repeat_interleave(torch.arange(len(first)), parts)
    row = start[of] + (torch.arange(len(of)) - (parts.cumsum(0) - parts)[of]) * block_m
    rows = torch.minimum(end[of] - row, torch.tensor(block_m))
    mine = owner[first][of]
    order = mine.argsort(stable=True)
    lists = count + int((owner == count).any())
    tiles = torch.stack([row, rows, first[of]], 1)[order]
    return tiles, torch.nn.functional.pad(torch.bincount(mine, minlength=lists).cumsum(0), (1, 0))


def padded(length: int, block: int) -> int:
    """The least multiple of `block` that isn't below `length`."""
    return -(-length // block) * block
