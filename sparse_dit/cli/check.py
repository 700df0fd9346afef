"""`sparse-dit check`: does a plan still suit a model that changed?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..tables import out
from .options import Model, Place, PlanName, Seed, Size, say, with_options

if TYPE_CHECKING:
    from ..generation import Case
    from ..plan import Plan
    from ..search.check import Checked

SHOWN = 40  # heads in the table


@with_options
def check(
    model: Model,
    plan: PlanName,
    *,
    lora: Annotated[
        Path | None, typer.Option(help="LoRA weights to load first (needs the package peft).")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Default: the plan's last calibration prompt.")
    ] = None,
    size: Size,
    rows: Annotated[int, typer.Option(min=2, help="Sampled query rows of each call.")] = 64,
    growth: Annotated[
        float, typer.Option(min=1.0, help="Times the planned error that a head may have.")
    ] = 1.5,
    share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Of the heads that may leave their error.")
    ] = 0.05,
    seed: Seed = 0,
    place: Place,
) -> None:
    """Score a plan again on a model that changed; exit code 1 if too many heads left their error.

    One generation of a few steps without the plan, with the size it was made at unless told otherwise.
    """
    from ..inputs import check_model, described, load_pipeline
    from ..integrations import host_of, workload
    from ..patch import patch
    from ..plan import Plan
    from ..search.check import check_plan

    loaded = Plan.from_pretrained(plan)
    check_model(model)
    known = dict(loaded.provenance.get("settings") or {})
    if known and isinstance(loaded.provenance.get("profile_steps"), int):
        known["steps"] = loaded.provenance["profile_steps"]
    settings = size.settings(known)
    case = _case(loaded, prompt, seed)
    if lora is not None and not lora.is_file():
        raise FileNotFoundError(f"--lora: there is no file {lora}")
    if lora is not None:
        _check_peft()
    if (pipe := described(model, place.device, place.dtype)) is not None:
        workload(pipe, settings).check(case)
        with patch(pipe, loaded):  # raises if it isn't for this pipeline
            pass
    pipe = load_pipeline(model, place.device, place.dtype)
    if lora is not None:
        host_of(pipe).add_lora(pipe, lora)
    say(f"scoring every head in {settings.steps} steps of {case.prompt!r}")
    found = check_plan(pipe, loaded, case, settings, rows=rows, growth=growth)
    _show(found)
    if found.share > share:
        say(
            f"too many heads left their error ({found.share:.0%}, {share:.0%} may): search a new plan"
        )
        raise typer.Exit(1)


def _case(plan: Plan, prompt: str | None, seed: int) -> Case:
    """What to generate: as the user says, or the plan's last calibration case."""
    from ..generation import Case

    if prompt is not None:
        return Case(prompt, seed)
    cases = plan.provenance.get("cases")
    listed = cases.get("calibration") if isinstance(cases, dict) else None
    try:
        return Case(listed[-1]["prompt"], listed[-1]["seed"])  # type: ignore[index]
    except (TypeError, KeyError, IndexError):
        raise ValueError("the plan names no calibration prompt: give --prompt TEXT") from None


def _check_peft() -> None:
    try:
        import peft  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("--lora needs the package peft: pip install peft", name="peft") from None


def _show(found: Checked) -> None:
    from rich.table import Table

    for note in found.notes:
        say(f"note: {note}")
    left = found.left
    if left:
        table = Table("component", "layer", "head", "stage", "planned error", "error now")
        for head in left[:SHOWN]:
            now = f"{head.now:.3f} ± {head.standard_error:.3f}"
            numbers = [str(head.head), str(head.stage), f"{head.planned:.3f}", now]
            table.add_row(head.component, head.layer, *numbers)
        out.print(table)
    more = f", {len(left) - SHOWN} of them not shown" if len(left) > SHOWN else ""
    unseen = f"; {found.unseen} at noise levels without a step weren't measured" * bool(
        found.unseen
    )
    out.print(
        f"{len(left)} of {len(found.heads)} sparse heads left their error{more}{unseen}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
