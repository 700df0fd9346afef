"""Which tiles a pattern's tiles see exactly, and what share of the pairs that is; of many candidates at once.

Letters in shapes: T tiles, R sampled rows, K candidates, L places in the lattice of relative tiles.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..index import seen_cells
from ..layout import Tile, TokenLayout, tile_order
from ..patterns import Blocks, Pattern, Stencil, Union, Vertical
from .cells import CellTable, cell_table
from .nested import Candidates, Cells, Nested, kind_of

SMALL = 160  # tiles up to which masks are kept: 25 KB each


@functools.lru_cache(maxsize=16)
def relative_cells(layout: TokenLayout, tile: Tile) -> Tensor:
    """For each pair of tiles the flat index of their offset in the lattice, int64 `[T, T]`."""
    table: CellTable = cell_table(layout, tile)
    lattice = (2 * table.counts - 1).tolist()
    delta = table.place[None] - table.place[:, None] + table.counts - 1
    strides = torch.tensor([math.prod(lattice[1:]), lattice[2], 1])
    return (delta * strides).sum(-1)


def seen_tiles(pattern: Pattern, layout: TokenLayout) -> Tensor:
    """Which tiles each tile sees exactly, bool `[T, T]`: what `index.seen_cells` says, by table where one
    tells it."""
    if _by_lattice(pattern):
        return _members(pattern, layout)[relative_cells(layout, pattern.tile)]
    if (told := _told(pattern, layout)) is not None:
        return told
    if len(cell_table(layout, pattern.tile).tokens) <= SMALL:
        return _kept(pattern, layout)
    return seen_cells(pattern, tile_order(layout, pattern.tile))


def _told(pattern: Pattern, layout: TokenLayout) -> Tensor | None:
    """What columns and blocks of this very lattice of whole tiles, and unions with them, say themselves."""
    shape, order = pattern.shape, tile_order(layout, pattern.tile)
    ragged = any(n % size for n, size in zip(order.grid, order.tile, strict=True))
    if ragged or pattern.sink_frames or pattern.cell is not None:
        return None
    counts = tuple(n // size for n, size in zip(order.grid, order.tile, strict=True))
    if isinstance(shape, Vertical) and shape.lattice == counts:
        columns = torch.zeros(math.prod(counts), dtype=torch.bool)
        columns[list(shape.cells)] = True
        return columns.expand(len(columns), -1)
    if isinstance(shape, Blocks) and shape.lattice == counts:
        return shape.mask()
    if isinstance(shape, Union) and any(getattr(s, "lattice", None) == counts for s in shape.of):
        parts = [seen_tiles(replace(pattern, shape=part), layout) for part in shape.of]
        return torch.stack(parts).any(0)
    return None


@functools.lru_cache(maxsize=1 << 14)
def _kept(pattern: Pattern, layout: TokenLayout) -> Tensor:
    return seen_cells(pattern, tile_order(layout, pattern.tile))


@functools.lru_cache(maxsize=1 << 16)
def density(pattern: Pattern, layout: TokenLayout) -> float:
    """Computed pairs over all pairs, far field included: what its index reports, without building it.

    For patterns whose cells are whole tiles.
    """
    (share,) = densities(Candidates([pattern]), layout)
    return share


def densities(candidates: Candidates, layout: TokenLayout) -> list[float]:
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


def grouped(
    candidates: Candidates, layout: TokenLayout, cells: Cells | None = None
) -> list[tuple[Tensor, Group]]:
    """The groups of candidates that aren't dense, and before each the numbers of its own, int64 `[K]`.

    Args:
        candidates: To be grouped.
        layout: Their grid.
        cells: Only the groups whose errors are computed from these; None for all.
    """
    made: dict[tuple[Cells, bool], _Gathered] = {}
    for first, part in candidates.numbered_parts():
        kind = part.kind if isinstance(part, Nested) else kind_of(part)
        if kind.is_dense or cells not in (None, kind.cells):
            continue
        group = made.setdefault((kind.cells, kind.far), _Gathered())
        if isinstance(part, Nested) and part.fits(layout):
            group.add(range(first, first + len(part)), part.members())
        else:
            for place in range(first, first + (len(part) if isinstance(part, Nested) else 1)):
                pattern = candidates[place]
                if _by_lattice(pattern):
                    group.add([place], _members(pattern, layout)[None])
                else:
                    group.others[place] = pattern
    return [
        (
            torch.tensor([*group.stencils, *group.others]),
            Group(of, far, group.joined(layout, of[0]), tuple(group.others.values())),
        )
        for (of, far), group in made.items()
    ]


@dataclass
class _Gathered:
    """The candidates of a group: numbers and members of stencils, and the others by number."""

    stencils: list[int] = field(default_factory=list)
    members: list[Tensor] = field(default_factory=list)
    others: dict[int, Pattern] = field(default_factory=dict)

    def add(self, places: Iterable[int], members: Tensor) -> None:
        self.stencils += places
        self.members.append(members)

    def joined(self, layout: TokenLayout, tile: Tile) -> Tensor:
        """The members of all stencils, bool `[k, L]`."""
        lattice = 2 * cell_table(layout, tile).counts - 1
        none = torch.zeros(0, math.prod(lattice.tolist()), dtype=torch.bool)
        return torch.cat([none, *self.members])


def _by_lattice(pattern: Pattern) -> bool:
    """Whether a pattern is a set of relative tiles."""
    return isinstance(pattern.shape, Stencil) and not pattern.sink_frames and pattern.cell is None


def _members(pattern: Pattern, layout: TokenLayout) -> Tensor:
    """The relative tiles of a stencil, bool `[L]`."""
    frames, rows, columns = cell_table(layout, pattern.tile).counts.tolist()
    return pattern.shape.members((frames, rows, columns)).flatten()
