"""Which tiles a pattern's tiles see exactly, and what share of the pairs that is; of many candidates at once.

Letters in shapes: T tiles, R sampled rows, K candidates, L places in the lattice of relative tiles.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..index import seen_cells
from ..layout import Tile, TokenLayout, tile_order
from ..patterns import Pattern, Stencil
from .cells import CellTable, cell_table

SMALL = 160  # tiles up to which masks are kept: 25 KB each
Cells = tuple[Tile, int | None]  # token order, and tokens of a pooled key


def cells_of(pattern: Pattern) -> Cells:
    """What a pattern's error is computed from: one entry of `statistics.sums_of`."""
    return pattern.tile, pattern.pool if pattern.far else None


@functools.lru_cache(maxsize=16)
def relative_cells(layout: TokenLayout, tile: Tile) -> Tensor:
    """For each pair of tiles the flat index of their offset in the lattice, int64 `[T, T]`."""
    table: CellTable = cell_table(layout, tile)
    lattice = (2 * table.counts - 1).tolist()
    delta = table.place[None] - table.place[:, None] + table.counts - 1
    strides = torch.tensor([math.prod(lattice[1:]), lattice[2], 1])
    return (delta * strides).sum(-1)


def seen_tiles(pattern: Pattern, layout: TokenLayout) -> Tensor:
    """Which tiles each tile sees exactly, bool `[T, T]`: what `index.seen_cells` says, stencils by table."""
    if _by_lattice(pattern, layout):
        (members,) = _members([pattern], layout)
        return members[relative_cells(layout, pattern.tile)]
    if len(cell_table(layout, pattern.tile).tokens) <= SMALL:
        return _kept(pattern, layout)
    return seen_cells(pattern, tile_order(layout, pattern.tile))


@functools.lru_cache(maxsize=1 << 14)
def _kept(pattern: Pattern, layout: TokenLayout) -> Tensor:
    return seen_cells(pattern, tile_order(layout, pattern.tile))


@functools.lru_cache(maxsize=1 << 16)
def density(pattern: Pattern, layout: TokenLayout) -> float:
    """Computed pairs over all pairs, far field included: what its index reports, without building it.

    For patterns whose cells are whole tiles.
    """
    return 1.0 if pattern.is_dense else Group.of([pattern], layout).densities(layout)[0].item()


def densities(candidates: tuple[Pattern, ...], layout: TokenLayout) -> list[float]:
    """`density` of each candidate."""
    result = torch.ones(len(candidates), dtype=torch.float64)
    for places, group in grouped(candidates, layout):
        result[places] = group.densities(layout)
    return result.tolist()


@dataclass(frozen=True, eq=False)
class Group:
    """Candidates of one token order, pool and far field: stencils first, by table, then the others.

    Args:
        cells: What their errors are computed from.
        far: Whether they have a far field.
        members: bool `[k, L]`, the relative tiles that each stencil sees.
        others: Patterns that aren't sets of relative tiles.
    """

    cells: Cells
    far: bool
    members: Tensor
    others: tuple[Pattern, ...]

    @staticmethod
    def of(patterns: Sequence[Pattern], layout: TokenLayout) -> Group:
        """A group of patterns; those that `_by_lattice` names first."""
        stencils = [p for p in patterns if _by_lattice(p, layout)]
        first = patterns[0]
        others = tuple(patterns[len(stencils) :])
        return Group(
            cells_of(first),
            first.far,
            _members(stencils or [first], layout)[: len(stencils)],
            others,
        )

    def rows(self, cell: Tensor, layout: TokenLayout) -> Tensor:
        """Which tiles are seen by the tiles `cell`, bool `[K, R, T]`."""
        tile = self.cells[0]
        parts = [self.members[:, relative_cells(layout, tile)[cell]]]
        if self.others:
            parts.append(
                torch.stack([seen_tiles(pattern, layout)[cell] for pattern in self.others])
            )
        return torch.cat(parts)

    def densities(self, layout: TokenLayout) -> Tensor:
        """Of each candidate, float64 `[K]`; see `density`."""
        tile, pool = self.cells
        sizes = tile_order(layout, tile).tile_offsets.diff().double()
        pooled = torch.ones_like(sizes) if pool is None else (sizes / pool).ceil()
        keys = sizes - pooled if self.far else sizes  # what seeing a tile exactly adds
        weight = torch.outer(sizes, keys)
        lattice = torch.zeros(self.members.shape[1], dtype=torch.float64)
        lattice.index_add_(0, relative_cells(layout, tile).flatten(), weight.flatten())
        seen = [(seen_tiles(pattern, layout) * weight).sum() for pattern in self.others]
        exact = torch.cat(
            [self.members.double() @ lattice, torch.tensor(seen, dtype=torch.float64)]
        )
        total, text, video = layout.seq_len, layout.num_text, layout.num_video
        always = text * total + video * text
        if self.far:
            always += (sizes.sum() * pooled.sum()).item()
        return (exact + always) / total**2


@functools.lru_cache(maxsize=256)
def grouped(
    candidates: tuple[Pattern, ...], layout: TokenLayout
) -> tuple[tuple[Tensor, Group], ...]:
    """The groups of candidates that aren't dense, and before each the numbers of its own, int64 `[K]`."""
    places: dict[tuple[Cells, bool], list[int]] = {}
    for place, pattern in enumerate(candidates):
        if not pattern.is_dense:
            places.setdefault((cells_of(pattern), pattern.far), []).append(place)
    result = []
    for listed in places.values():
        listed.sort(key=lambda place: not _by_lattice(candidates[place], layout))  # is stable
        group = Group.of([candidates[place] for place in listed], layout)
        result.append((torch.tensor(listed), group))
    return tuple(result)


def _by_lattice(pattern: Pattern, layout: TokenLayout) -> bool:
    """Whether a pattern is a set of relative tiles that the lattice tells all of."""
    shape = pattern.shape
    if not isinstance(shape, Stencil) or pattern.sink_frames or pattern.cell is not None:
        return False
    counts = cell_table(layout, pattern.tile).counts.tolist()
    return shape.reach is None or all(r >= n - 1 for r, n in zip(shape.reach, counts, strict=True))


def _members(stencils: Sequence[Pattern], layout: TokenLayout) -> Tensor:
    """The relative tiles of stencils in one token order, bool `[k, L]`; nothing of other shapes."""
    counts = cell_table(layout, stencils[0].tile).counts.numpy()
    runs = [getattr(pattern.shape, "offsets", ()) for pattern in stencils]
    owner = np.repeat(np.arange(len(runs)), [len(part) for part in runs])
    flat = [number for part in runs for run in part for number in run]
    frame, row, column, length = np.array(flat, dtype=np.int64).reshape(-1, 4).T
    reach = counts - 1
    first = np.clip(column, -reach[2], counts[2])
    last = np.clip(column + length, -reach[2], counts[2])  # exclusive
    inside = (np.abs(frame) <= reach[0]) & (np.abs(row) <= reach[1]) & (first < last)
    edges = np.zeros((len(runs), *(2 * reach + 1)[:2], 2 * counts[2]), dtype=np.int32)
    place = owner[inside], frame[inside] + reach[0], row[inside] + reach[1]
    np.add.at(edges, (*place, first[inside] + reach[2]), 1)
    np.add.at(edges, (*place, last[inside] + reach[2]), -1)
    member = edges.cumsum(-1)[..., :-1] > 0
    return torch.from_numpy(member.reshape(len(runs), -1))
