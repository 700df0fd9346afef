"""What is learned of a head while profiling: which places matter, and how well candidates do.

Discovery gathers, from one set of prompts, how much output error each relative tile, column or block
saves when it is computed exactly. Scoring then measures, on other prompts, every candidate's error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..layout import Tile, TokenLayout
from .candidates import tilings
from .cells import CellSums, SampledRows, cell_table
from .nested import Candidates, Cells
from .placed import MAX_BLOCK_CELLS
from .seen import by_offset, grouped

COUNT = "offset_count"  # pairs at each offset: the same for all heads, whose rows are the same
# for each token order and name; of a layer `[H, ...]` (its `COUNT` `[...]`), of a head `[...]`
LayerStatistics = dict[Tile, dict[str, Tensor]]
HeadStatistics = dict[Tile, dict[str, Tensor]]


def statistics_shapes(layout: TokenLayout, tile: Tile) -> dict[str, list[int]]:
    """The shapes `[...]` of a head's accumulators in one token order, by name."""
    table = cell_table(layout, tile)
    lattice, cells = (2 * table.counts - 1).tolist(), len(table.tokens)
    blocks = {"block": [cells, cells]} if cells <= MAX_BLOCK_CELLS else {}
    return {
        "offset_far": lattice,
        "offset_drop": lattice,
        COUNT: lattice,
        "column": [cells],
        **blocks,
    }


def empty_statistics(layout: TokenLayout, tiles: Iterable[Tile], heads: int) -> LayerStatistics:
    """Zeroed accumulators of a layer of `heads` heads, in each token order."""
    return {tile: of_heads(statistics_shapes(layout, tile), heads) for tile in tiles}


def layer_shapes(shapes: Mapping[str, list[int]], heads: int) -> dict[str, list[int]]:
    """The shapes of a layer's tensors, from those of a head's: `[heads, ...]`, that of `COUNT` `[...]`."""
    return {key: shape if key == COUNT else [heads, *shape] for key, shape in shapes.items()}


def of_heads(shapes: Mapping[str, list[int]], heads: int) -> dict[str, Tensor]:
    """Float32 zeros of a layer, in the shapes of `layer_shapes`."""
    found = layer_shapes(shapes, heads)
    return {key: torch.zeros(shape, dtype=torch.float32) for key, shape in found.items()}


def of_head(statistics: Mapping[str, Tensor], head: int) -> dict[str, Tensor]:
    """What belongs to one head of a layer's tensors of one token order, without a copy."""
    return {key: value if key == COUNT else value[head] for key, value in statistics.items()}


def compared_shapes(layout: TokenLayout) -> dict[str, list[int]]:
    """The shapes `[...]` of the sums by which a head's attention is compared between prompts, by name.

    They are summed over sampled rows in the first token order, see `dependence.add_rows`.
    """
    every = statistics_shapes(layout, tilings(layout)[0])
    return {name: every[name] for name in ("offset_far", COUNT, "column")}


def discover(
    statistics: Mapping[str, Tensor],
    heads: range,
    sums: CellSums,
    layout: TokenLayout,
    tile: Tile,
) -> None:
    """Add the sampled rows of some heads of a layer to its accumulators in one token order.

    Args:
        statistics: The layer's tensors in this order, see `empty_statistics`.
        heads: The h heads.
        sums: The sums of their rows by cells.
        layout: The token layout of the sampled call, with or without text.
        tile: The token order.
    """
    far, drop = sums.benefit(far=True), sums.benefit(far=False)  # [h, R, T]
    added = {
        "offset_far": by_offset(far, sums.cell, layout, tile),
        "offset_drop": by_offset(drop, sums.cell, layout, tile),
        "column": far.sum(1).cpu(),
    }
    if "block" in statistics:
        tiles = far.shape[2]
        block = far.new_zeros(len(heads), tiles, tiles)
        added["block"] = block.index_add_(1, sums.cell.to(far.device), far).cpu()
    add_heads(statistics, heads, added, sums.cell, layout, tile)


def add_heads(
    known: Mapping[str, Tensor],
    heads: range,
    added: Mapping[str, Tensor],
    cell: Tensor,
    layout: TokenLayout,
    tile: Tile,
) -> None:
    """Add what some heads gave to a layer's tensors in place, with the first head the counts of pairs too.

    Args:
        known: The layer's tensors, `[H, ...]`, its `COUNT` `[...]`.
        heads: The h heads.
        added: What is added, `[h, ...]`, by name.
        cell: Each sampled row's own tile, int64 `[R]`.
        layout, tile: The token layout of the sampled call, and the token order.
    """
    for key, values in added.items():
        known[key][heads.start : heads.stop] += values
    if heads.start == 0:
        once = torch.ones(len(cell), known["column"].shape[-1], dtype=torch.float32)
        known[COUNT].add_(by_offset(once, cell, layout, tile))


def score(
    sums: CellSums, cells: Cells, candidates: Sequence[Candidates], layout: TokenLayout
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Squared errors of candidates' outputs on the sampled rows of h heads, a group of them at a time.

    Args:
        sums: The sums of the heads' rows by cells.
        cells: The kind of cells that were summed over; candidates of other kinds are left out, the dense one
            too.
        candidates: Each head's candidates, of the same kinds in the same order.
        layout: The token layout of the sampled call, with or without text.

    Yields:
        For each group the candidates' numbers, int64 `[k]`; `error` and `error_squared`, `[h, k]`: the sum
        over rows of the squared error, and of its square; `recall`, `[h, k]`: the sum over rows of the
        attention mass that is seen exactly. All on the CPU.
    """
    device, groups = sums.mass.device, [grouped(one, layout, cells) for one in candidates]
    for same in zip(*groups, strict=True):
        where, first = same[0]
        seen = torch.stack([group.rows(sums.cell, layout, device) for _, group in same])
        outputs, mass = sums.outputs_and_recall(seen, first.far)
        rows = (outputs - sums.out[:, None]).square().sum(-1)  # [h, k, R]
        found = rows.sum(-1), rows.square().sum(-1), mass.sum(-1)
        error, square, recall = torch.stack(found).cpu()
        yield where, error, square, recall


def score_all(
    sampled: SampledRows, candidates: Candidates, layout: TokenLayout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of every candidate on the sampled rows of one head, `[1, ...]`; see `score`.

    Returns:
        `error`, `error_squared` and `recall`, `[K]`; `norm` `[]`: sum over rows of the squared output.
    """
    error, square, recall = torch.zeros(3, len(candidates), dtype=torch.float32)
    recall[torch.tensor([kind.is_dense for kind in candidates.kinds])] = float(len(sampled.rows))
    norm, grid = (
        torch.zeros((), dtype=torch.float32),
        layout.without_global(),
    )  # so that all texts share what is kept of it
    for cells in candidates.cells:
        table = cell_table(layout, cells[0], sampled.p.device)
        sums = sampled.by_cells(table, cells[1])
        norm = sums.out.square().sum().cpu()
        for where, *found in score(sums, cells, [candidates], grid):
            error[where], square[where], recall[where] = (of_head for (of_head,) in found)
    return error, square, recall, norm
