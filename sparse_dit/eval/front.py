"""A search's front: read from beside its plan, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from ..plan import Plan
    from ..search.front import Front


def front_beside(name: str, plan: Plan) -> Front | None:
    """The front that a search wrote beside a plan's file; None if there is none, or another plan's.

    Args:
        name: The plan's file or folder; any other name of a plan has no front.
        plan: What it holds.

    Raises:
        PlanError: If the front's file is damaged.
    """
    from ..search.front import front_path, model_hash, read_front

    place = Path(name)
    path = front_path(place / "plan.json" if place.is_dir() else place)
    if not path.is_file():
        return None
    front = read_front(path)
    return front if model_hash(plan.components) == front.config_hash else None


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
