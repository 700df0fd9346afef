"""Candidates that all noise levels of a head have in common, so that it can keep one; see `stages`.

What is found of a head at a level are sums over sampled rows, in units of their outputs. Added up over levels
they say which offsets save most over the whole generation.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..curve import Curve
from ..layout import TokenLayout
from .candidates import BUDGETS, tilings
from .cells import cell_table
from .nested import Candidates, Kind, Nested
from .ranking import Ranking
from .reach import BEYOND, MOST_RUNS
from .statistics import HeadStatistics

FAR = "offset_far"  # what offsets are ranked by
SUMMED = (FAR, "offset_count", BEYOND[FAR], BEYOND["offset_count"])


def summed(levels: Sequence[HeadStatistics]) -> HeadStatistics:
    """What was found of a head at several noise levels together, as far as `shared_candidates` needs it.

    In float64: the order of the levels then doesn't decide between offsets.
    """
    result: HeadStatistics = {}
    for head in levels:
        for tile, statistics in head.items():
            total: dict[str, Tensor] = result.setdefault(tile, {})
            for key in SUMMED:
                if key in statistics:
                    value = statistics[key].double()
                    total[key] = total[key] + value if key in total else value
    return result


def shared_candidates(
    statistics: HeadStatistics, layout: TokenLayout, most_runs: int = MOST_RUNS
) -> Candidates:
    """Stencils with far field in every token order, of the budgets that a level's own have.

    Args:
        statistics: Of a head, `summed` over its noise levels.
        layout: Calibration layout.
        most_runs: Of a stencil, see `reach.nested_stencil`.
    """
    result = []
    for tile in tilings(layout, any(isinstance(tile, Curve) for tile in statistics)):
        ranking = Ranking(statistics[tile], FAR, cell_table(layout, tile), most_runs)
        result.append(Nested(Kind(tile, far=True), ranking, ranking.within(BUDGETS)))
    return Candidates(result)
