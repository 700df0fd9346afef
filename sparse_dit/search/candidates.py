"""The patterns that the search chooses among: fixed ones, and those that a head's statistics suggest."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..curve import Curve
from ..layout import Tile, TokenLayout
from ..patterns import (
    Dense,
    Pattern,
    Skip,
    SlidingTile,
    Stencil,
    Stripe,
    Window,
)
from .cells import CellTable, cell_table
from .nested import Candidates, Kind, Nested, Unbuilt
from .placed import placed
from .ranking import MOST_RUNS, Ranking
from .seen import seen_tiles

BUDGETS = (
    *(0.01, 0.02, 0.03, 0.04, 0.055, 0.07, 0.085, 0.1, 0.125, 0.15, 0.175),
    *(0.2, 0.235, 0.27, 0.31, 0.35, 0.4, 0.45, 0.52, 0.6, 0.7),
)
DROP_BUDGETS = (0.1, 0.2, 0.35)
TILE_TOKENS = 64

DENSE = Pattern(Dense())


def tilings(layout: TokenLayout) -> tuple[Tile, ...]:
    """Token orders that are tried: cubes, flat tiles of one frame, and lines (of a column, of a row)
    through all frames.

    Squares through all frames (2 x 4 tokens of 8 frames, say) bring nothing beside the lines.

    Args:
        layout: The token layout at calibration.
    """
    frames = layout.grid[0]
    if frames == 1:
        return ((1, 8, 8),)
    length = max(1, TILE_TOKENS // frames)
    lines: list[Tile] = [(None, length, 1), (None, 1, length)]
    return tuple(dict.fromkeys([(4, 4, 4), (1, 8, 8), *lines]))


@functools.lru_cache(maxsize=16)
def fixed(layout: TokenLayout) -> tuple[Pattern, ...]:
    """Geometric candidates, the same for every head (without the dense one).

    None of them sees everything at this size, and no two see the same: see `_distinct`.
    """
    cube, *others = tilings(layout)
    _, height, width = layout.grid
    shapes: list[tuple[object, Tile]] = [(Skip(), cube)]
    for frames in (None, 2, 0):
        for side in (max(1, max(height, width) // 6), None):
            shapes.append((Window(frames, side, side), cube))
    shapes += [(SlidingTile(None, 3, 3), cube), (SlidingTile(1, 3, 3), cube)]
    shapes += [(SlidingTile(None, 1, None), cube), (SlidingTile(None, None, 1), cube)]
    shapes.append((SlidingTile(1, None, None), cube))
    for tile in others:
        assert not isinstance(tile, Curve), "tilings are cubes and lines"
        if tile[0] is None:
            shapes += [(Stripe(space_width=width), tile) for width in ((0, 1), (2, 0))]
        else:
            shapes += [(Stripe(time_width=w), tile) for w in (1, 2)]
            strides = ((1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4))
            shapes += [(Stripe(time_width=w, time_stride=s), tile) for w, s in strides]
    distinct = _distinct(shapes, layout)
    return tuple(Pattern(shape, tile, far=far) for shape, tile in distinct for far in (False, True))


def _distinct(
    shapes: Sequence[tuple[object, Tile]], layout: TokenLayout
) -> list[tuple[object, Tile]]:
    """The shapes that are useful at this size: each sees something else, and none sees everything.

    Of shapes that see the same tiles the first one is kept. A window of two frames on either side, in cubes
    of four, sees all of 8 frames. It would be found free of error, but it doesn't see all of 9 frames: what
    limits nothing here must not be a limit at other sizes.

    Args:
        shapes: Shapes with their token orders, those without a limit first.
        layout: The token layout at calibration.
    """
    known: dict[Tile, list[Tensor]] = {}
    result = []
    for shape, tile in shapes:
        seen = seen_tiles(Pattern(shape, tile), layout)
        others = known.setdefault(tile, [torch.ones_like(seen)])
        if not any(torch.equal(seen, other) for other in others):
            others.append(seen)
            result.append((shape, tile))
    return result


def found(
    statistics: dict[str, Tensor],
    tile: Tile,
    layout: TokenLayout,
    most_runs: int = MOST_RUNS,
) -> list[Pattern | Unbuilt]:
    """Candidates that follow a head's statistics in one token order.

    Args:
        statistics: What the head's sampled rows gave in that order: `offset_far`, `offset_drop` and
            `offset_count` (lattices of relative tiles), `column` `[C]`, maybe `block` `[C, C]`, and maybe
            `beyond_far`, `beyond_drop` and `beyond_count` of a larger lattice; see `discover` and
            `profile_larger`.
        tile: The token order.
        layout: The token layout at calibration.
        most_runs: How many row intervals a stencil may have, see `ranking.nested_stencil`.
    """
    table = cell_table(layout, tile)
    lines = not isinstance(tile, Curve) and tile[0] is None
    far_kind = Kind(tile, far=True)
    best = Ranking(statistics, "offset_far", table, most_runs)
    dropped = Ranking(statistics, "offset_drop", table, most_runs)
    result: list[Pattern | Unbuilt] = [
        Nested(Kind(tile, far=False), dropped, dropped.within(BUDGETS if lines else DROP_BUDGETS)),
        Nested(far_kind, best, best.within(BUDGETS)),
    ]
    if int(table.counts.prod()) == len(table.tokens):  # what follows needs a full lattice
        result += placed(statistics, best, far_kind, layout)
    return result


def _reach(table: CellTable) -> tuple[int, int, int]:
    """The greatest distances between tiles."""
    frames, rows, columns = (table.counts - 1).tolist()
    return frames, rows, columns


def chosen_offsets(
    statistics: dict[str, Tensor], benefit: str, budget: float, table: CellTable
) -> Tensor:
    """Offsets of the stencil within the budget of exact pairs, int64 `[n, 3]`, best first.

    Args:
        statistics: The sums over offsets of one head in one token order.
        benefit: `"offset_far"` or `"offset_drop"`: the saved error with a far field or without one.
        budget: The density over the whole video that the stencil may have.
        table: The cells of that order.
    """
    ranking = Ranking(statistics, benefit, table)
    (count,) = ranking.within([budget])
    return ranking.offsets[:count]


def single_stencil(
    statistics: dict[str, Tensor], budget: float, tile: Tile, layout: TokenLayout
) -> Pattern:
    """The stencil of the best offsets within a density of exact pairs (`budget`), with a far field."""
    table = cell_table(layout, tile)
    offsets = chosen_offsets(statistics, "offset_far", budget, table)
    return Pattern(Stencil.from_offsets(offsets, _reach(table)), tile, far=True)


def all_candidates(
    statistics: dict[Tile, dict[str, Tensor]], layout: TokenLayout, most_runs: int = MOST_RUNS
) -> Candidates:
    """All candidates of a head, the dense one first; as many, in the same order, for every head of a layout.

    Args:
        statistics: What the head's sampled rows gave in each token order; see `found`.
        layout: The token layout at calibration.
        most_runs: How many row intervals a stencil may have, see `ranking.nested_stencil`.
    """
    parts: list[Pattern | Unbuilt] = [DENSE, *fixed(layout)]
    for tile in tilings(layout):
        parts += found(statistics[tile], tile, layout, most_runs)
    return Candidates(parts)
