"""Which tiles a pattern's tiles see exactly, and what share of the pairs that is; of many candidates at once.

Letters in shapes: T tiles, R sampled rows, K candidates, L places in the lattice of relative tiles.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..index import seen_cells
from ..layout import Tile, TokenLayout, tile_order
from ..patterns import Pattern, Stencil
from .cells import CPU, CellTable, cell_table
from .nested import Candidates, Cells, Drawn, Nested

SMALL = 160  # tiles up to which masks are kept: 25 KB each


@functools.lru_cache(maxsize=16)
def relative_cells(layout: TokenLayout, tile: Tile, device: torch.device = CPU) -> Tensor:
    """For each pair of tiles the flat index of their offset in the lattice, int64 `[T, T]`, on a device."""
    if device != CPU:
        return relative_cells(layout, tile).to(device)
    table: CellTable = cell_table(layout, tile)
    lattice = (2 * table.counts - 1).tolist()
    delta = table.place[None] - table.place[:, None] + table.counts - 1
    strides = torch.tensor([math.prod(lattice[1:]), lattice[2], 1])
    return (delta * strides).sum(-1)


def by_offset(values: Tensor, cell: Tensor, layout: TokenLayout, tile: Tile) -> Tensor:
    """Sums over the pairs of tiles that lie at the same offset, over the lattice of offsets.

    Args:
        values: `[..., R, T]`, for rows and tiles.
        cell: int64 `[R]`, the tile that each row lies in.
        layout, tile: The token order.

    Returns:
        `[..., *lattice]`, on the CPU.
    """
    lattice = (2 * cell_table(layout, tile).counts - 1).tolist()
    places = relative_cells(layout, tile, values.device)[cell].flatten()
    sums = values.new_zeros(*values.shape[:-2], math.prod(lattice))
    return sums.index_add_(-1, places, values.flatten(-2)).cpu().unflatten(-1, lattice)


def seen_tiles(pattern: Pattern, layout: TokenLayout) -> Tensor:
    """Which tiles each tile sees exactly, bool `[T, T]`: what `index.seen_cells` says, stencils by table."""
    if _by_lattice(pattern):
        return _members(pattern, layout)[relative_cells(layout, pattern.tile)]
    if len(cell_table(layout, pattern.tile).tokens) <= SMALL:
        return _kept(pattern, layout)
    return seen_cells(pattern, tile_order(layout, pattern.tile))


@functools.lru_cache(maxsize=1 << 14)
def _kept(pattern: Pattern, layout: TokenLayout) -> Tensor:
    return seen_cells(pattern, tile_order(layout, pattern.tile))


def _seen_by(patterns: tuple[Pattern, ...], layout: TokenLayout, cell: Tensor) -> Tensor:
    """Which tiles the tiles `cell` see by several patterns of one token order, bool `[k, R, T]`."""
    if len(cell_table(layout, patterns[0].tile).tokens) <= SMALL:
        return _stacked(patterns, layout)[:, cell]
    places = tuple(cell.tolist())
    return torch.stack([_seen_at(pattern, layout, places) for pattern in patterns])


@functools.lru_cache(maxsize=1 << 10)
def _seen_at(pattern: Pattern, layout: TokenLayout, places: tuple[int, ...]) -> Tensor:
    """Which tiles some tiles see, bool `[R, T]`; cached, as all heads of a call ask for the same rows."""
    if _by_lattice(pattern):
        return seen_tiles(pattern, layout)[list(places)]
    return seen_cells(pattern, tile_order(layout, pattern.tile), torch.tensor(places))


@functools.lru_cache(maxsize=64)
def _stacked(patterns: tuple[Pattern, ...], layout: TokenLayout) -> Tensor:
    """What patterns see, bool `[k, T, T]`; cached, for patterns that all heads have."""
    return torch.stack([seen_tiles(pattern, layout) for pattern in patterns])


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
    """Candidates of one token order, pool and far field: stencils first, then the others.

    Args:
        cells: The kind of cells that their errors are computed from.
        far: Whether they have a far field.
        members: The relative tiles that each stencil sees, bool `[k, L]`.
        others: Patterns that aren't sets of relative tiles.
        drawn: Candidates that aren't built yet, but of which it is known what they see.
    """

    cells: Cells
    far: bool
    members: Tensor
    others: tuple[Pattern, ...]
    drawn: tuple[Drawn, ...]

    def rows(self, cell: Tensor, layout: TokenLayout, device: torch.device = CPU) -> Tensor:
        """The tiles that each candidate shows to the tiles `cell` (int64 `[R]`), bool `[K, R, T]`."""
        places = relative_cells(layout, self.cells[0], device)[cell]
        parts = [self.members.to(device)[:, places]]
        if self.others:
            parts.append(_seen_by(self.others, layout, cell).to(device))
        for one in self.drawn:
            parts.append(one.seen(cell).expand(1, len(cell), -1).to(device))
        return torch.cat(parts)

    def densities(self, layout: TokenLayout) -> Tensor:
        """The density of each candidate, float64 `[K]`; see `density`."""
        tile, pool = self.cells
        sizes = tile_order(layout, tile).tile_offsets.diff().double()
        pooled = torch.ones_like(sizes) if pool is None else (sizes / pool).ceil()
        keys = sizes - pooled if self.far else sizes  # what seeing a tile exactly adds
        weight = torch.outer(sizes, keys)
        lattice = torch.zeros(self.members.shape[1], dtype=torch.float64)
        lattice.index_add_(0, relative_cells(layout, tile).flatten(), weight.flatten())
        seen = [(seen_tiles(pattern, layout) * weight).sum() for pattern in self.others]
        seen += [(one.seen() * weight).sum() for one in self.drawn]
        exact = torch.cat(
            [self.members.double() @ lattice, torch.tensor(seen, dtype=torch.float64)]
        )
        total, everywhere = layout.seq_len, layout.num_global
        always = everywhere * (total + layout.num_grid)
        if self.far:
            always += (sizes.sum() * pooled.sum()).item()
        return (exact + always) / total**2


def grouped(
    candidates: Candidates, layout: TokenLayout, cells: Cells | None = None
) -> list[tuple[Tensor, Group]]:
    """The groups of candidates that aren't dense, and before each the numbers of its candidates, int64 `[K]`.

    Args:
        candidates: The candidates of a head.
        layout: The token layout at which they are compared.
        cells: Only the groups whose errors are computed from these; None for all.
    """
    made: dict[tuple[Cells, bool], _Gathered] = {}
    for part, (places, kind) in zip(candidates.parts, candidates.spans, strict=True):
        if kind.is_dense or cells not in (None, kind.cells):
            continue
        group = made.setdefault((kind.cells, kind.far), _Gathered())
        if isinstance(part, Pattern) or not part.fits(layout):
            for place in places:
                group.add_pattern(place, candidates[place], layout)
        elif isinstance(part, Nested):
            group.add(places, part.members())
        else:
            group.drawn[places[0]] = part
    return [
        (
            torch.tensor([*group.stencils, *group.others, *group.drawn]),
            Group(
                of,
                far,
                group.joined(layout, of[0]),
                tuple(group.others.values()),
                tuple(group.drawn.values()),
            ),
        )
        for (of, far), group in made.items()
    ]


@dataclass
class _Gathered:
    """The candidates of a group: numbers and members of stencils, and the others by number."""

    stencils: list[int] = field(default_factory=list)
    members: list[Tensor] = field(default_factory=list)
    others: dict[int, Pattern] = field(default_factory=dict)
    drawn: dict[int, Drawn] = field(default_factory=dict)

    def add_pattern(self, place: int, pattern: Pattern, layout: TokenLayout) -> None:
        if _by_lattice(pattern):
            self.add([place], _members(pattern, layout)[None])
        else:
            self.others[place] = pattern

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
