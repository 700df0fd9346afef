"""`sparse-dit eval`: measure a plan, or compare methods over densities."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ..outputs import Outputs
from ..tables import out, show_frontier, show_quality
from .options import (
    Device,
    Dtype,
    Force,
    Frames,
    Guidance,
    Height,
    Model,
    Prompt,
    Prompts,
    Seed,
    Steps,
    Text,
    Width,
    say,
    settings_of,
)

if TYPE_CHECKING:
    from ..plan import Plan


class _PlanIfNothingElse(TyperGroup):
    """`eval MODEL PLAN` is `eval plan MODEL PLAN`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Options before MODEL are the command's, not the group's."""
        own = {"plan", "frontier", "--help"}
        return super().parse_args(ctx, args if not args or args[0] in own else ["plan", *args])


evaluation = typer.Typer(
    cls=_PlanIfNothingElse,
    help="Measure plans: `eval MODEL PLAN`, or `eval frontier`.",
    no_args_is_help=True,
)


@evaluation.command("plan")
def evaluate(
    model: Model,
    plan: Annotated[str, typer.Argument(help="Plan: file, folder, built-in name or hub id.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("out"),
    prompt: Prompt = None,
    prompts: Prompts = None,
    height: Height = None,
    width: Width = None,
    num_frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    max_sequence_length: Text = None,
    drawn_clips: Annotated[
        int, typer.Option(help="Drawn clips for the teacher-forced error (Wan only).", min=0)
    ] = 0,
    fps: Annotated[float, typer.Option(help="Of the written videos.")] = 8,
    against: Annotated[
        str | None, typer.Option(help="Another plan, to show the difference to.")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Other sizes to measure at too: 192x192x15,256x256x15.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    force: Force = False,
) -> int:
    """The default: measure a plan against dense and write report.html, report.json and videos.

    Prompts and settings that are left out are those that the plan was verified with.
    """
    from ..eval.command import Request, evaluate_plan
    from ..eval.front import front_beside
    from ..eval.report_files import FILES
    from ..eval.sizes import parse_sizes
    from ..generation import Case
    from ..inputs import described, load_pipeline, read_prompts
    from ..plan import Plan

    loaded = Plan.from_pretrained(plan)
    known = loaded.provenance.get("settings") or {}
    settings = settings_of(known, height, width, num_frames, steps, guidance, max_sequence_length)
    if prompt or prompts:
        texts = read_prompts(prompt or [], prompts)
        cases = [Case(text, seed + i) for i, text in enumerate(texts)]
    else:
        cases = _held_out(loaded)
    request = Request(
        folder,
        cases,
        settings,
        drawn_clips,
        fps,
        force,
        front=front_beside(plan, loaded),
        against=(against, Plan.from_pretrained(against)) if against else None,
        sizes=parse_sizes(sizes) if sizes is not None else (),
    )
    outputs = Outputs(replace=force, say=say)
    outputs.expect_folder("--out", folder, FILES)
    if (pipe := described(model, device, dtype)) is not None:
        request.check(pipe, loaded)
    pipe = load_pipeline(model, device, dtype)
    command = "sparse-dit " + " ".join(sys.argv[1:])
    report, files = evaluate_plan(pipe, loaded, request, command, say, outputs)
    out.print(report.quality.summary, markup=False, highlight=False, soft_wrap=True)
    show_quality(report)
    for file in files:
        out.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)
    return outputs.code


@evaluation.command()
def frontier(
    file: Annotated[Path, typer.Option("--json", help="Rows; goes on with one that is there.")],
    model: Annotated[
        str | None, typer.Option(help="Folder of a pipeline; default the embedded model.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG or SVG to write.")] = None,
    density: Annotated[list[float] | None, typer.Option(help="Repeatable.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Repeatable; default all.")] = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    held_out: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    height: Height = None,
    width: Width = None,
    num_frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    max_sequence_length: Text = None,
    searched_at: Annotated[
        str | None,
        typer.Option(help="Another size, 192x192x15: plans searched there are measured here too."),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> int:
    """Quality over density: searched plans against the published methods, on held-out prompts."""
    from ..demo.run import CALIBRATION, HELD_OUT, SETTINGS
    from ..eval.figures import save_figure
    from ..eval.frontier import DENSITIES, METHODS, FrontierRequest, figure_of, started
    from ..eval.frontier import frontier as measure
    from ..eval.sizes import parse_sizes
    from ..generation import Case
    from ..inputs import described, load_pipeline, read_prompts
    from ..resources import shipped

    known = {} if model else SETTINGS.to_dict()
    settings = settings_of(known, height, width, num_frames, steps, guidance, max_sequence_length)
    if prompt or prompts or model:
        texts = read_prompts(prompt or [], prompts)
        cases = [Case(text, seed + i) for i, text in enumerate(texts)]
        later = [Case(text, seed + len(cases) + i) for i, text in enumerate(held_out or [])]
    else:
        cases, later = list(CALIBRATION), list(HELD_OUT)
        if held_out:
            later = [Case(text, seed + len(cases) + i) for i, text in enumerate(held_out)]
    searched_there = None
    if searched_at is not None:
        other, *more = parse_sizes(searched_at)
        if more:
            raise ValueError(f"--searched-at takes one size, got {searched_at!r}")
        searched_there = replace(settings, width=other[0], height=other[1], num_frames=other[2])
    request = FrontierRequest(
        cases, later, settings, density or DENSITIES, method or METHODS, file, searched_there
    )
    name, dtype = model or str(shipped("tiny_wan")), dtype or (None if model else "float32")
    outputs = Outputs(replace=True, say=say)
    outputs.expect("--json", file, again=True)
    if plot is not None:
        outputs.expect("--plot", plot, ".png", ".svg")
    if (pipe := described(name, device, dtype)) is not None:
        started(pipe, request)
    rows = measure(load_pipeline(name, device, dtype), request, say, outputs)
    show_frontier(rows)
    if plot is not None:
        figure = figure_of(rows)
        drawn = outputs.write(plot, lambda path: save_figure(figure, path))
        out.print(f"wrote {drawn}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"wrote {outputs.lies(file)}", markup=False, highlight=False, soft_wrap=True)
    return outputs.code


def _held_out(plan: Plan) -> list[Any]:
    """The cases that a plan was verified with; ValueError if it doesn't name any."""
    from ..generation import Case

    cases = plan.provenance.get("cases")
    listed = cases.get("held_out") if isinstance(cases, dict) else None
    if not listed:
        raise ValueError("the plan names no held-out prompts: give --prompt TEXT or --prompts FILE")
    try:
        return [Case(entry["prompt"], entry["seed"]) for entry in listed]
    except (TypeError, KeyError):
        raise ValueError("the plan's held-out prompts can't be read: give --prompt TEXT") from None
