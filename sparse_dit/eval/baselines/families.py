"""The patterns that published methods choose among, over their parameters. None has a far field."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import torch
from torch import Tensor

from ...layout import Tile, TokenLayout
from ...patterns import Blocks, Pattern, Skip, SlidingTile, Stripe, Union, Vertical, Window
from ...search.candidates import tilings
from ...search.cells import cell_table
from ...search.ranking import best_first

BLOCK_BUDGETS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
MODE_BUDGETS = (0.05, 0.1, 0.2, 0.3)
BANDS = tuple(0.025 * n for n in range(1, 21))


def raster(layout: TokenLayout) -> Tile:
    """About 64 tokens of whole rows of one frame: blocks of the order that models hand over."""
    return (1, max(1, 64 // max(1, layout.grid[2])), None)


def families(layout: TokenLayout) -> dict[str, list[Pattern]]:
    """For each family the patterns that are the same for every head."""
    found = {
        "window": windows(layout),
        "tile": sliding_tiles(layout),
        "radial": radials(layout),
        "spatial": spatial_bands(layout),
        "temporal": temporal_bands(layout),
        "skip": [Pattern(Skip(), tilings(layout)[0])],
    }
    return {name: list(dict.fromkeys(patterns)) for name, patterns in found.items()}


def windows(layout: TokenLayout) -> list[Pattern]:
    """Windows in frames, rows and columns, in token orders of cubes, of single frames and of rows."""
    frames, height, width = layout.grid
    sides = sorted(
        {max(1, round(max(height, width) * f)) for f in (0.06, 0.1, 0.17, 0.25, 0.33, 0.42, 0.5)}
    )
    near = sorted({0, 1, 2, max(1, frames // 4), max(1, frames // 2)})
    return [
        Pattern(Window(f, s, s), tile)
        for tile in (*tilings(layout)[:2], raster(layout))
        for f in (*near, None)
        for s in (*sides, None)
        if f is not None or s is not None
    ]


def sliding_tiles(layout: TokenLayout) -> list[Pattern]:
    """Windows of 3-D tiles, clamped at the borders: Sliding Tile Attention, arXiv 2502.04507."""
    tile = tilings(layout)[0]
    frames, rows, columns = cell_table(layout, tile).counts.tolist()
    return [
        Pattern(SlidingTile(f, min(s, rows), min(s, columns)), tile)
        for f in range(1, frames + 1)
        for s in range(1, max(rows, columns) + 1)
        if (f, s) != (frames, max(rows, columns))
    ]


def radials(layout: TokenLayout) -> list[Pattern]:
    """Radial Attention, arXiv 2506.19852: neighbouring frames whole, then a band of rows that halves each
    time the distance in frames doubles; with and without the first frame as a sink. Its band of the
    raster order is a band of rows here."""
    frames, height, _ = layout.grid
    result = []
    for decay in (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0):
        for whole in (0, 1):
            shapes = [Window(whole, None, None)]
            distance = 2 * whole + 1
            while distance < frames:
                band = round(decay * height / 2 / (distance + 1) * 2)
                shapes.append(Window(min(2 * distance, frames - 1), band, None))
                distance = 2 * distance + 1
            shape = Union(tuple(shapes)) if len(shapes) > 1 else shapes[0]
            for tile in (tilings(layout)[0], raster(layout)):
                result += [Pattern(shape, tile), Pattern(shape, tile, sink_frames=1)]
    return result


def spatial_bands(layout: TokenLayout) -> list[Pattern]:
    """Bands around the diagonal of the frame-major order, as Sparse VideoGen's spatial heads: a number of
    whole frames, and the nearest rows of the next."""
    frames, height, _ = layout.grid
    flat, result = tilings(layout)[min(1, len(tilings(layout)) - 1)], []
    for budget, tile in itertools.product(BANDS, (raster(layout), flat)):
        reach = budget * frames / 2  # frames to each side
        whole, part = int(reach), round((reach - int(reach)) * height)
        shape = Window(whole, None, None)
        band = Union((shape, Window(whole + 1, part, None))) if part else shape
        result += [Pattern(band, tile), Pattern(band, tile, sink_frames=1)]
        if not whole:
            result.append(
                Pattern(Window(0, max(1, round(budget * frames * height / 2)), None), tile)
            )
    return result


def temporal_bands(layout: TokenLayout) -> list[Pattern]:
    """Bands around the diagonal of the pixel-major order, as Sparse VideoGen's temporal heads."""
    _, height, width = layout.grid
    tile: Tile = tilings(layout)[-1]
    result = []
    for budget in BANDS:
        rows, columns = divmod(max(1, round(budget * height * width / 2)), width)
        band = Pattern(Stripe(space_width=(rows, columns)), tile)
        result += [band, replace(band, sink_frames=1)]
    return result


def row_wise_blocks(benefit: Tensor, layout: TokenLayout) -> list[Pattern]:
    """For each budget the blocks that matter most for each row of blocks: AdaSpa, arXiv 2502.21079, with
    blocks that are chosen once.

    Args:
        benefit: `[T, T]`, what a tile of keys saves a tile of queries.
        layout: The token layout at calibration.
    """
    tile = tilings(layout)[0]
    lattice = tuple(cell_table(layout, tile).counts.tolist())
    result = []
    for budget in BLOCK_BUDGETS:
        keep = max(1, math.floor(budget * len(benefit)))
        best = best_first(benefit)[:, :keep]
        mask = torch.zeros_like(benefit, dtype=torch.bool).scatter_(-1, best, True)
        result.append(Pattern(Blocks.from_mask(mask, lattice), tile))
    return result


def vertical_stripes(benefit: Tensor, layout: TokenLayout) -> list[Pattern]:
    """For each budget the tiles of keys that save all queries most: Sparse-vDiT's third pattern, whose
    places its paper leaves open (arXiv 2506.03065).

    Args:
        benefit: `[T]`, what a tile of keys saves all queries.
        layout: The token layout at calibration.
    """
    tile = tilings(layout)[0]
    lattice = tuple(cell_table(layout, tile).counts.tolist())
    result = []
    for budget in MODE_BUDGETS:
        best = best_first(benefit)[: max(1, round(budget * len(benefit)))]
        result.append(Pattern(Vertical(lattice, tuple(best.sort().values.tolist())), tile))
    return result
