"""Candidates of fixed places: columns that all tiles see, and the blocks that each tile sees."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..layout import TokenLayout, tile_order
from ..patterns import Blocks, Pattern, Union, Vertical
from .nested import Drawn, Kind
from .ranking import Ranking
from .seen import relative_cells
from .steady import best_first

COLUMN_BUDGETS = (0.05, 0.15, 0.3)
STENCIL_BUDGET = 0.1  # of the stencil that is seen beside the most columns
BLOCK_BUDGETS = (0.1, 0.2, 0.35)
MAX_BLOCK_CELLS = 256  # static block masks are tried up to this many tiles: their size is squared


def placed(
    statistics: dict[str, Tensor], ranking: Ranking, kind: Kind, layout: TokenLayout
) -> list[Drawn] | list[Pattern]:
    """The best columns, the most of them with a stencil, and the best blocks.

    Built at once where tiles at the border are smaller: how places are stretched then decides what is seen.

    Args:
        statistics: Of a head in one token order, whose tiles fill a lattice.
        ranking: Of its offsets.
        kind: With that order.
        layout: At calibration.
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
    """What a head's statistics say of places; T tiles."""

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

    def seen_columns(self, budget: float) -> Tensor:
        """bool `[1, T]`."""
        seen = torch.zeros(1, len(self.ranking.table.tokens), dtype=torch.bool)
        seen[:, list(best_columns(self.statistics["column"], budget))] = True
        return seen

    def columns(self, budget: float) -> Vertical:
        return Vertical(self.lattice, best_columns(self.statistics["column"], budget))

    def seen_union(self, count: int) -> Tensor:
        """bool `[T, T]`."""
        (members,) = self.ranking.members([count])
        stencil = members[relative_cells(self.layout, self.tile)]
        return stencil | self.seen_columns(COLUMN_BUDGETS[-1])

    def union(self, count: int) -> Union:
        return Union((self.ranking.stencil([count], 0), self.columns(COLUMN_BUDGETS[-1])))

    def seen_blocks(self, budget: float) -> Tensor:
        """bool `[T, T]`: the best tiles of each."""
        benefit = self.statistics["block"]
        keep = max(1, round(budget * len(benefit)))
        best = best_first(benefit)[:, :keep]
        return torch.zeros_like(benefit, dtype=torch.bool).scatter_(-1, best, True)

    def blocks(self, budget: float) -> Blocks:
        return Blocks.from_mask(self.seen_blocks(budget), self.lattice)


def best_columns(columns: Tensor, budget: float) -> tuple[int, ...]:
    """The share of columns with the greatest benefit, at least one, ascending."""
    count = max(1, round(budget * len(columns)))
    return tuple(best_first(columns)[:count].sort().values.tolist())
