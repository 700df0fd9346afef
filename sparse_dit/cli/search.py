"""`sparse-dit search`: find a plan for a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..outputs import Outputs
from ..tables import out, show_plan
from ..whole_file import uninterrupted
from .options import Cases, Force, Model, Place, ProfileSteps, Size, resumable, say, with_options

if TYPE_CHECKING:
    from ..search import Searched


@with_options
def search(
    model: Model,
    *,
    plan_file: Annotated[Path, typer.Option("--out", help="Plan to write.")] = Path("plan.json"),
    cases: Cases,
    held_out: Annotated[
        list[str] | None, typer.Option(help="A prompt to verify on; repeatable.")
    ] = None,
    size: Size,
    target_speedup: Annotated[
        float | None, typer.Option(help="Forecast speed-up to reach.")
    ] = None,
    max_error: Annotated[float | None, typer.Option(help="Largest error of head outputs.")] = None,
    min_psnr: Annotated[float | None, typer.Option(help="Least PSNR on held-out prompts.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Where the profile is kept; default beside the plan.")
    ] = None,
    profile_steps: ProfileSteps = None,
    cost_table: Annotated[
        str | None,
        typer.Option(
            help="Solve for another device: name or file of its table; h100, h800, h20 are estimates."
        ),
    ] = None,
    dense_seconds: Annotated[
        float | None, typer.Option(help="Of one dense generation on that device.")
    ] = None,
    place: Place,
    force: Force = False,
) -> int:
    """Find a plan for a pipeline. One of --target-speedup, --max-error, --min-psnr is the dial.

    If even the best plan misses it, that one is written, and the exit code is 1.
    """
    from ..inputs import check_model, described, load_pipeline
    from ..search import Objective
    from ..search import search_plan as find
    from ..search.asked import check_profile, check_search, profiled_at, split_cases
    from ..search.objective import shortfall
    from ..search.pricing import TargetDevice

    given = cases.read()
    settings = size.settings()
    dial: dict[str, Any] = {
        "target_speedup": target_speedup,
        "max_error": max_error,
        "min_psnr": min_psnr,
    }
    Objective(**dial)
    target_device = TargetDevice.of(cost_table, dense_seconds)
    later = cases.numbered(held_out, after=len(given))
    kept = profile or plan_file.with_name(f"{plan_file.stem}.profile.safetensors")
    outputs = Outputs(replace=force, say=say)
    outputs.expect("--out", plan_file, ".json", beside=_beside)
    outputs.expect("--profile", kept, again=True)
    check_model(model)
    calibration, _ = split_cases(given, later or None, "held_out")
    if (pipe := described(model, place.device, place.dtype)) is not None:
        check_search(
            pipe,
            calibration[0],
            settings,
            profile_steps=profile_steps,
            target_device=target_device,
        )
        profiled = profiled_at(settings, profile_steps)
        check_profile(pipe, calibration, profiled, kept)
    pipe = load_pipeline(model, place.device, place.dtype)
    try:
        searched = find(
            pipe,
            given,
            held_out=later or None,
            settings=settings,
            profile=kept,
            profile_steps=profile_steps,
            report=say,
            device_table=cost_table,
            dense_seconds=dense_seconds,
            **dial,
        )
    except KeyboardInterrupt:
        resumable(kept)
        raise
    _save(searched, plan_file, outputs, force)
    if kept.exists():
        out.print(f"the profile is kept in {kept}", markup=False, highlight=False, soft_wrap=True)
    missed = shortfall(searched.plan)
    if missed:
        say(missed)
    return outputs.code or int(bool(missed))


def _beside(plan_file: Path) -> tuple[Path, Path]:
    """What a search writes with a plan."""
    from ..plan.storage import tensor_path
    from ..search.front import front_path

    return tensor_path(plan_file), front_path(plan_file)


def _save(searched: Searched, plan_file: Path, outputs: Outputs, force: bool) -> None:
    """Write the plan and its search's other points, and show it."""
    from ..search.front import front_path, write_front

    with uninterrupted():  # one plan beside another's front would be wrong
        lies = outputs.write(plan_file, lambda path: searched.plan.save(path, overwrite=force))
        front = outputs.put(front_path(lies), lambda path: write_front(searched.front, path))
    show_plan(searched.plan)
    out.print(
        f"wrote {lies} and {front.name} (other points: sparse-dit show --pick)", soft_wrap=True
    )
