"""Candidates that name tiles of the calibrated size: columns that all tiles see, and blocks of each tile."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..layout import TokenLayout, tile_order
from ..patterns import Blocks, Pattern, Union, Vertical
from .nested import Drawn, Kind
from .ranking import Ranking, best_first
from .seen import relative_cells

COLUMN_BUDGETS = (0.05, 0.15, 0.3)
STENCIL_BUDGET = 0.1  # density of the stencil that joins the most columns
BLOCK_BUDGETS = (0.1, 0.2, 0.35)
MAX_BLOCK_CELLS = 256  # static block masks are tried up to this many tiles: their size is squared


def placed(
    statistics: dict[str, Tensor], ranking: Ranking, kind: Kind, layout: TokenLayout
) -> list[Drawn] | list[Pattern]:
    """A head's candidates that name tiles: its best columns, columns joined with a stencil, its best blocks.

    Columns come at the densities `COLUMN_BUDGETS`, the densest of them also joined with the stencil of
    density `STENCIL_BUDGET`, and blocks at `BLOCK_BUDGETS`. Patterns are built at once where tiles at the
    border are smaller, as how tiles are scaled to the grid then decides what is seen.

    Args:
        statistics: What the head's sampled rows gave in one token order, whose tiles fill a lattice.
        ranking: The head's offsets, best first.
        kind: The kind of the candidates, with that token order.
        layout: The token layout at calibration.
    """
    head = _Places(statistics, ranking, layout, kind)
    order = tile_order(layout, kind.tile)
    grid, (stencil,) = order.grid, ranking.within([STENCIL_BUDGET])
    both = [
        *((head.seen_columns, head.columns, budget) for budget in COLUMN_BUDGETS),
        (head.seen_union, head.union, stencil),
    ]
    if "block" in statistics:
        both += [(head.seen_blocks, head.blocks, budget) for budget in BLOCK_BUDGETS]
    drawn = [
        Drawn(kind, grid, functools.partial(seen, amount), functools.partial(shape, amount))
        for seen, shape, amount in both
    ]
    whole = all(n % size == 0 for n, size in zip(grid, order.tile, strict=True))
    return drawn if whole else [candidate.pattern() for candidate in drawn]


class _Places:
    """The columns, unions and blocks that a head's statistics give at some density; T tiles."""

    def __init__(
        self, statistics: dict[str, Tensor], ranking: Ranking, layout: TokenLayout, kind: Kind
    ) -> None:
        self.statistics, self.ranking, self.layout, self.tile = (
            statistics,
            ranking,
            layout,
            kind.tile,
        )
        frames, rows, columns = ranking.table.counts.tolist()
        self.lattice = (frames, rows, columns)

    def seen_columns(self, budget: float, tiles: Tensor | None = None) -> Tensor:
        """The tiles that every tile sees in the best columns, bool `[1, T]`."""
        seen = torch.zeros(1, len(self.ranking.table.tokens), dtype=torch.bool)
        seen[:, list(best_columns(self.statistics["column"], budget))] = True
        return seen

    def columns(self, budget: float) -> Vertical:
        return Vertical(self.lattice, best_columns(self.statistics["column"], budget))

    def seen_union(self, count: int, tiles: Tensor | None = None) -> Tensor:
        """The tiles that each tile sees in a stencil of `count` offsets or in columns, bool `[T, T]`; or some
        tiles, `[R, T]`."""
        (members,) = self.ranking.members([count])
        places = relative_cells(self.layout, self.tile)
        stencil = members[places if tiles is None else places[tiles]]
        return stencil | self.seen_columns(COLUMN_BUDGETS[-1])

    def union(self, count: int) -> Union:
        return Union((self.ranking.stencil([count], 0), self.columns(COLUMN_BUDGETS[-1])))

    def seen_blocks(self, budget: float, tiles: Tensor | None = None) -> Tensor:
        """The best tiles for each tile, bool `[T, T]`; or for some tiles, `[R, T]`."""
        benefit = self.statistics["block"]
        keep = max(1, round(budget * len(benefit)))
        if tiles is not None:
            benefit = benefit[tiles]
        best = best_first(benefit)[:, :keep]
        return torch.zeros_like(benefit, dtype=torch.bool).scatter_(-1, best, True)

    def blocks(self, budget: float) -> Blocks:
        return Blocks.from_mask(self.seen_blocks(budget), self.lattice)


def best_columns(columns: Tensor, budget: float) -> tuple[int, ...]:
    """The numbers of the columns of greatest benefit, rising: a share `budget` of all, at least one."""
    count = max(1, round(budget * len(columns)))
    return tuple(best_first(columns)[:count].sort().values.tolist())
