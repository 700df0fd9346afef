"""What is learned of a head while profiling: which places matter, and how well candidates do.

Discovery gathers, from one set of prompts, how much output error each relative tile, column or block
saves when it is computed exactly. Scoring then measures, on other prompts, every candidate's error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..layout import Tile, TokenLayout
from ..patterns import Pattern
from .candidates import MAX_BLOCK_CELLS, tilings
from .cells import CellSums, SampledRows, cell_table
from .seen import Cells, grouped, relative_cells

HeadStatistics = dict[Tile, dict[str, Tensor]]


def empty_statistics(layout: TokenLayout, tile: Tile) -> dict[str, Tensor]:
    """Zeroed accumulators of one head in one token order (T tiles, lattice of relative tiles)."""
    table = cell_table(layout, tile)
    lattice = (2 * table.counts - 1).tolist()
    cells = len(table.tokens)
    result = {key: torch.zeros(lattice) for key in ("offset_far", "offset_drop", "offset_count")}
    result["column"] = torch.zeros(cells)
    if cells <= MAX_BLOCK_CELLS:
        result["block"] = torch.zeros(cells, cells)
    return result


def empty_heads(layout: TokenLayout, tiles: Iterable[Tile], count: int) -> list[HeadStatistics]:
    """Zeroed accumulators of so many heads, in each token order."""
    orders = list(tiles)
    return [{tile: empty_statistics(layout, tile) for tile in orders} for _ in range(count)]


def look_shapes(layout: TokenLayout) -> dict[str, list[int]]:
    """Of what heads are compared by from prompt to prompt; see `dependence.look`."""
    table = cell_table(layout, tilings(layout)[0])
    lattice = (2 * table.counts - 1).tolist()
    return {"offset_far": lattice, "offset_count": lattice, "column": [len(table.tokens)]}


def discover(
    statistics: dict[str, Tensor], sums: CellSums, layout: TokenLayout, tile: Tile
) -> None:
    """Add the sampled rows of one head to its accumulators."""
    far, drop = sums.benefit(far=True), sums.benefit(far=False)
    flat = relative_cells(layout, tile)[sums.cell].flatten()
    for key, value in (
        ("offset_far", far),
        ("offset_drop", drop),
        ("offset_count", torch.ones_like(far)),
    ):
        statistics[key].view(-1).index_add_(0, flat, value.flatten())
    statistics["column"] += far.sum(0)
    if "block" in statistics:
        statistics["block"].index_add_(0, sums.cell, far)


def sums_of(
    sampled: SampledRows, wanted: Iterable[Cells], layout: TokenLayout
) -> dict[Cells, CellSums]:
    """The sums over cells that `score` needs of a head's sampled rows, each once."""
    return {
        (tile, pool): sampled.by_cells(cell_table(layout, tile), pool)
        for tile, pool in dict.fromkeys(wanted)
    }


def score(
    sums: Mapping[Cells, CellSums], candidates: tuple[Pattern, ...], layout: TokenLayout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared error of every candidate's output on the sampled rows of one head.

    Args:
        sums: Of the head, for the cells of every candidate that isn't dense.
        candidates: What is judged.
        layout: Their grid.

    Returns:
        `error` `[K]` and `error_squared` `[K]`: sum over rows of the squared error, and of its square;
        `recall` `[K]`: sum over rows of the attention mass seen exactly; `norm` `[]`: sum over rows of
        the squared output.
    """
    error, square = torch.zeros(2, len(candidates))
    first = next(iter(sums.values()))
    recall = torch.tensor([float(len(first.out)) * p.is_dense for p in candidates])
    for where, group in grouped(candidates, layout):
        part = sums[group.cells]
        outputs, mass = part.outputs_and_recall(group.rows(part.cell, layout), group.far)
        rows = (outputs - part.out).square().sum(-1)  # [K, R]
        error[where], square[where] = rows.sum(1), rows.square().sum(1)
        recall[where] = mass.sum(1)
    return error, square, recall, first.out.square().sum()
