"""`sparse-dit show`: a plan as a table, and the other points of its search."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..outputs import Outputs
from ..tables import out, show_front, show_heads, show_plan
from .options import Force, PlanName, Steps, say

if TYPE_CHECKING:
    from ..plan import Plan


def show(
    plan: PlanName,
    heads: Annotated[bool, typer.Option("--heads", help="Every head of every layer.")] = False,
    front: Annotated[bool, typer.Option("--front", help="The other points of its search.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="The other points as a picture: PNG, SVG or PDF to write.")
    ] = None,
    pick: Annotated[
        str | None,
        typer.Option(help="Take another point: speedup=2.0, density=0.3, error=0.05, psnr=30."),
    ] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--out", help="With --pick: plan to write.")
    ] = None,
    export_sta: Annotated[
        Path | None, typer.Option(help="Write its windows as an STA strategy; see docs/hosts.md.")
    ] = None,
    steps: Steps = None,
    flow_shift: Annotated[
        float | None,
        typer.Option(help="With --export-sta: of the schedule; default the plan's own."),
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="With --export-sta: which of several transformers.")
    ] = None,
    force: Force = False,
) -> int:
    """Show a plan as a table; or other points of the search that it comes from."""
    from ..plan import Plan

    if (export_sta is None) != (steps is None):
        raise ValueError(
            "--export-sta and --steps go together: a strategy is for one number of steps"
        )
    if export_sta is None and (flow_shift is not None or component is not None):
        raise ValueError("--flow-shift and --component go with --export-sta")
    if export_sta is not None and steps is not None:
        return _export_sta(
            Plan.from_pretrained(plan), export_sta, steps, flow_shift, component, force
        )

    if (pick is None) != (plan_file is None):
        raise ValueError("--pick and --out go together: which point, and the plan file to write")
    if pick or front or picture:
        return _show_points(plan, front, picture, pick, plan_file, force)
    loaded = Plan.from_pretrained(plan)
    show_plan(loaded)
    if heads:
        show_heads(loaded)
    return 0


def _export_sta(
    plan: Plan, file: Path, steps: int, shift: float | None, component: str | None, force: bool
) -> int:
    """`show --export-sta`."""
    from ..hosts.sta import export_sta, sigmas_of

    outputs = Outputs(replace=force, say=say)
    outputs.expect("--export-sta", file, ".json")
    made = export_sta(plan, sigmas_of(plan, steps, shift), component=component)
    lies = outputs.write(file, lambda path: made.strategy.save(path, overwrite=force))
    for line in [*made.lines, f"wrote {lies}"]:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    return outputs.code


def _show_points(
    plan: str,
    front: bool,
    picture: Path | None,
    pick: str | None,
    plan_file: Path | None,
    force: bool,
) -> int:
    """`show --front`, `show --picture` and `show --pick`."""
    from ..plan import Plan
    from ..plan.storage import tensor_path
    from ..search import front as fronts

    outputs = Outputs(replace=force, say=say)
    if plan_file is not None:
        outputs.expect("--out", plan_file, ".json", beside=lambda path: [tensor_path(path)])
    if picture is not None:
        outputs.expect("--picture", picture, ".png", ".svg", ".pdf")
    wanted = fronts.parse_pick(pick) if pick else None
    loaded = Plan.from_pretrained(plan)
    file = Path(plan) / "plan.json" if Path(plan).is_dir() else Path(plan)
    found = fronts.read_front(fronts.front_path(file))
    if wanted and plan_file:
        other = fronts.pick(loaded, found, *wanted)
        lies = outputs.write(plan_file, lambda path: other.save(path, overwrite=force))
        show_plan(other)
        out.print(f"wrote {lies}", markup=False, highlight=False, soft_wrap=True)
    if front:
        show_front(found)
    if picture is not None:
        from ..eval.figures import save_figure
        from ..eval.front import figure_of

        figure = figure_of(found, loaded)
        lies = outputs.write(picture, lambda path: save_figure(figure, path))
        out.print(f"wrote {lies}", markup=False, highlight=False, soft_wrap=True)
    return outputs.code
