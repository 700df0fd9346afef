"""A picture of a search's front."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from ..plan import Plan
    from ..search.front import Front


def figure_of(front: Front, plan: Plan) -> Figure:
    """Forecast error of heads and density over forecast speed-up, with the plan's own point."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    speeds = [point.speedup for point in front.points]
    axes.plot(speeds, [point.error for point in front.points], "o-", label="error of heads")
    axes.plot(speeds, [point.density for point in front.points], "s--", label="density")
    if "speedup" in plan.forecast:
        axes.axvline(plan.forecast["speedup"], color="black", linestyle=":", label="this plan")
    axes.set_xlabel("forecast speed-up of a generation")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    return figure
