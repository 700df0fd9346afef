"""What is learned of a head while profiling: which places matter, and how well candidates do.

Discovery gathers, from one set of prompts, how much output error each relative tile, column or block
saves when it is computed exactly. Scoring then measures, on other prompts, every candidate's error.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..index import seen_cells
from ..layout import Tile, TokenLayout, tile_order
from ..patterns import Pattern, Stencil
from .candidates import MAX_BLOCK_CELLS, tilings
from .cells import CellSums, CellTable, SampledRows, cell_table

HeadStatistics = dict[Tile, dict[str, Tensor]]
Cells = tuple[Tile, int | None]  # token order, and tokens of a pooled key


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


@functools.lru_cache(maxsize=16)
def relative_cells(layout: TokenLayout, tile: Tile) -> Tensor:
    """For each pair of tiles the flat index of their offset in the lattice, int64 `[T, T]`."""
    table: CellTable = cell_table(layout, tile)
    lattice = (2 * table.counts - 1).tolist()
    delta = table.place[None] - table.place[:, None] + table.counts - 1
    strides = torch.tensor([math.prod(lattice[1:]), lattice[2], 1])
    return (delta * strides).sum(-1)


SMALL = 160  # tiles up to which masks are kept: 25 KB each


def seen_tiles(pattern: Pattern, layout: TokenLayout) -> Tensor:
    """Which tiles each tile sees exactly, bool `[T, T]`; kept if small, as most are needed again."""
    if len(cell_table(layout, pattern.tile).tokens) <= SMALL:
        return _kept(pattern, layout)
    return _seen(pattern, layout)


@functools.lru_cache(maxsize=1 << 14)
def _kept(pattern: Pattern, layout: TokenLayout) -> Tensor:
    return _seen(pattern, layout)


def _seen(pattern: Pattern, layout: TokenLayout) -> Tensor:
    """What `index.seen_cells` says; sets of relative tiles, most of the candidates, by table."""
    table, shape = cell_table(layout, pattern.tile), pattern.shape
    counts = table.counts.numpy()
    lattice = 2 * counts - 1
    runs = np.array(getattr(shape, "offsets", ()), dtype=np.int64).reshape(-1, 4)
    runs = _inside(runs, counts)
    reach = getattr(shape, "reach", None)
    plain = not pattern.sink_frames and pattern.cell is None
    plain = plain and (reach is None or bool((np.array(reach) >= counts - 1).all()))
    if not (isinstance(shape, Stencil) and plain and runs[:, 3].sum() <= lattice.prod()):
        return seen_cells(pattern, tile_order(layout, pattern.tile))
    count = runs[:, 3]
    offsets = np.repeat(runs[:, :3], count, 0)
    offsets[:, 2] += np.arange(len(offsets)) - np.repeat(count.cumsum() - count, count)
    offsets += counts - 1
    member = np.zeros(lattice, dtype=bool)
    member[tuple(offsets.T)] = True
    return torch.from_numpy(member.reshape(-1))[relative_cells(layout, pattern.tile)]


def _inside(runs: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """What a video of so many tiles can have of a stencil's runs, `[n, 4]`; those left may be empty."""
    runs = runs[(np.abs(runs[:, :2]) < counts[:2]).all(1)]
    first = np.maximum(runs[:, 2], 1 - counts[2])
    stop = np.minimum(runs[:, 2] + runs[:, 3], counts[2])
    return np.column_stack([runs[:, :2], first, np.maximum(stop - first, 0)])


@functools.lru_cache(maxsize=1 << 16)
def density(pattern: Pattern, layout: TokenLayout) -> float:
    """Computed pairs over all pairs, far field included: what its index reports, without building it.

    For patterns whose cells are whole tiles.
    """
    if pattern.is_dense:
        return 1.0
    sizes = tile_order(layout, pattern.tile).tile_offsets.diff().double()
    seen = seen_tiles(pattern, layout).double()
    total, text, video = layout.seq_len, layout.num_text, layout.num_video
    pairs = sizes @ seen @ sizes + text * total + video * text
    if pattern.far:
        pooled = torch.ones_like(sizes) if pattern.pool is None else (sizes / pattern.pool).ceil()
        pairs = pairs + sizes @ (1 - seen) @ pooled
    return float(pairs) / total**2


def cells_of(pattern: Pattern) -> Cells:
    """What a pattern's error is computed from: one entry of `sums_of`."""
    return pattern.tile, pattern.pool if pattern.far else None


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
        sums: Of the head, for the cells of every candidate but the first.
        candidates: The first is dense.
        layout: Their grid.

    Returns:
        `error` `[K]` and `error_squared` `[K]`: sum over rows of the squared error, and of its square;
        `recall` `[K]`: sum over rows of the attention mass seen exactly; `norm` `[]`: sum over rows of
        the squared output.
    """
    count = len(candidates)
    error, square, recall = torch.zeros(count), torch.zeros(count), torch.zeros(count)
    first = next(iter(sums.values()))
    recall[0] = len(first.out)  # the first candidate is dense
    groups: dict[tuple[Cells, bool], list[int]] = {}
    for place, pattern in enumerate(candidates[1:], 1):
        groups.setdefault((cells_of(pattern), pattern.far), []).append(place)
    for (cells, far), places in groups.items():
        part = sums[cells]
        seen = torch.stack([seen_tiles(candidates[p], layout)[part.cell] for p in places])
        outputs, mass = part.outputs_and_recall(seen, far)
        rows = (outputs - part.out).square().sum(-1)  # [K, R]
        where = torch.tensor(places)
        error[where], square[where] = rows.sum(1), rows.square().sum(1)
        recall[where] = mass.sum(1)
    return error, square, recall, first.out.square().sum()
