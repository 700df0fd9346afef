"""A search's front: read from beside its plan, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..search.front import MOST_PSNR

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..plan import Plan
    from ..search.front import Front


def front_beside(name: str, plan: Plan) -> Front | None:
    """The front that a search wrote beside a plan's file; None if there is none, or another plan's.

    Args:
        name: The plan's file or folder; any other name of a plan has no front.
        plan: The plan that was read from there.

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
    """Forecast error of heads, density and quality over forecast speed-up, with the plan's own point.

    Quality is PSNR, or of a language model its divergence from dense. It is drawn if the search measured what
    it is forecast from. What was measured of the plan itself is a point of its own.
    """
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
    handles, labels = axes.get_legend_handles_labels()
    top = axes
    if (quality := _quality_axis(axes, front, plan)) is not None:
        more, names = quality.get_legend_handles_labels()
        handles, labels, top = [*handles, *more], [*labels, *names], quality
    top.legend(handles, labels, frameon=False)
    return figure


def _quality_axis(axes: Axes, front: Front, plan: Plan) -> Axes | None:
    """A second axis with the divergence of the points, or the PSNR of those not forecast to be equal."""
    of_text = any(point.kl is not None for point in front.points)
    name, unit, measured = ("KL", "nats a token", "kl") if of_text else ("PSNR", "dB", "psnr_db")
    found = [(p.speedup, p.kl if of_text else p.psnr) for p in front.points]
    known = [(s, q) for s, q in found if q is not None and (of_text or q < MOST_PSNR)]
    own = [plan.forecast.get("speedup"), plan.measured.get(measured)]
    plan_point = [float(value) for value in own if isinstance(value, int | float)]
    if not known and len(plan_point) < 2:
        return None
    right = axes.twinx()
    if known:
        speeds, values = ([point[axis] for point in known] for axis in (0, 1))
        right.plot(speeds, values, "^-", color="tab:green", label=f"{name}, forecast")
    if len(plan_point) == 2:
        star = {"marker": "*", "s": 140.0, "color": "tab:red", "zorder": 3}
        right.scatter(plan_point[0], plan_point[1], label=f"{name}, measured", **star)
    right.set_ylabel(f"{name} against dense ({unit})")
    return right
