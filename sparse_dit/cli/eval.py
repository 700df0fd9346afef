"""`sparse-dit eval`: measure a plan, or compare methods over densities."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ..inputs import is_denoiser
from ..outputs import Outputs
from ..tables import (
    out,
    show_frontier,
    show_language_frontier,
    show_language_quality,
    show_quality,
)
from .compared import ended, expected, told_apart
from .denoising import denoising_frontier
from .options import Cases, Force, Model, Place, PlanName, Size, say, with_options

if TYPE_CHECKING:
    from torch import Tensor

    from ..plan import Plan


@dataclass(frozen=True)
class Reading:
    """What a language model's plan is measured on."""

    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="File that a language model reads, or what a VLM's processor made, as .safetensors; "
            "repeatable. Default: Python's own."
        ),
    ] = None
    tokens: Annotated[int, typer.Option(help="Most tokens of a text.")] = 4096
    tasks: Annotated[
        str, typer.Option(help="Kinds of question, by name with commas; all or none.")
    ] = "all"
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of questions: 1024,4096; default --tokens.")
    ] = None
    samples: Annotated[int, typer.Option(help="Questions of each kind and length.")] = 1

    def texts(self) -> Mapping[str, str | Mapping[str, Tensor]]:
        """The texts by name."""
        from ..eval.language.haystack import sources
        from ..inputs import read_texts

        if not self.text:
            return sources()
        return dict(zip(map(str, self.text), read_texts(self.text), strict=True))

    def asked_at(self) -> list[int]:
        """The lengths of questions; none for that of the texts."""
        try:
            return [int(length) for length in self.lengths.split(",")] if self.lengths else []
        except ValueError:
            raise ValueError(
                f"--lengths must be whole numbers with commas, got {self.lengths!r}"
            ) from None


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
@with_options
def evaluate(
    model: Model,
    plan: PlanName,
    *,
    folder: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("out"),
    cases: Cases,
    size: Size,
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
    dense: Annotated[
        str, typer.Option(help="Who computes dense calls of the plan: stock or fastest.")
    ] = "stock",
    reading: Reading,
    place: Place,
    force: Force = False,
) -> int:
    """The default: measure a plan against dense and write report.html, report.json and videos.

    Prompts and settings that are left out are those that the plan was verified with. A language model's
    plan is measured on texts and on questions about them.
    """
    from ..eval.command import Request, evaluate_plan
    from ..eval.front import front_beside
    from ..eval.report_files import FILES
    from ..eval.sizes import parse_sizes
    from ..inputs import check_model, described, load_pipeline
    from ..plan import Plan

    loaded = Plan.from_pretrained(plan)
    of_text = any(part.kind == "language_model" for part in loaded.components.values())
    if of_text:
        if cases.given or drawn_clips or against or sizes or size != Size() or dense != "stock":
            raise ValueError(
                "prompts, sizes, drawn clips, --dense and other plans are for pipelines; a language model's "
                "plan is measured on --text, --tasks, --lengths"
            )
        return _evaluate_text(model, loaded, reading, place, folder, force)
    if reading != Reading():
        raise ValueError("--text, --tokens, --tasks, --lengths, --samples are for language models")
    check_model(model)
    known = loaded.provenance.get("settings") or {}
    settings = size.settings(known)
    given = cases.read() if cases.given else _held_out(loaded)
    request = Request(
        folder,
        given,
        settings,
        drawn_clips,
        fps,
        force,
        front=front_beside(plan, loaded),
        against=(against, Plan.from_pretrained(against)) if against else None,
        sizes=parse_sizes(sizes) if sizes is not None else (),
        dense=dense,
    )
    outputs = Outputs(replace=force, say=say)
    outputs.expect_folder("--out", folder, FILES)
    if (pipe := described(model, place.device, place.dtype)) is not None:
        request.check(pipe, loaded)
    pipe = load_pipeline(model, place.device, place.dtype)
    command = "sparse-dit " + " ".join(sys.argv[1:])
    report, files = evaluate_plan(pipe, loaded, request, command, say, outputs)
    out.print(report.quality.summary, markup=False, highlight=False, soft_wrap=True)
    show_quality(report)
    for file in files:
        out.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)
    return outputs.code


def _evaluate_text(
    model: str, plan: Plan, reading: Reading, place: Place, folder: Path, force: bool
) -> int:
    """Measure a language model's plan, and write and show the report."""
    from ..eval.language.command import evaluate_language_plan
    from ..eval.language.quality import LanguageRequest
    from ..eval.language.report import FILES, findings
    from ..eval.language.tasks import KINDS
    from ..inputs import check_language_model, load_language_model

    named = [name.strip() for name in reading.tasks.split(",")]
    kinds = {"all": list(KINDS), "none": []}.get(reading.tasks, named)
    request = LanguageRequest(
        texts=reading.texts(),
        tokens=reading.tokens,
        lengths=reading.asked_at(),
        kinds=kinds,
        samples=reading.samples,
    )
    outputs = Outputs(replace=force, say=say)
    outputs.expect_folder("--out", folder, FILES)
    check_language_model(model)
    loaded, tokenizer = load_language_model(model, place.device, place.dtype)
    report, lies = evaluate_language_plan(
        loaded,
        tokenizer,
        plan,
        request,
        folder,
        command="sparse-dit " + " ".join(sys.argv[1:]),
        say=say,
        outputs=outputs,
        overwrite=force,
    )
    show_language_quality(report.quality)
    for sentence in findings(report):
        out.print(sentence, markup=False, highlight=False, soft_wrap=True)
    for name in FILES:
        out.print(f"wrote {lies / name}", markup=False, highlight=False, soft_wrap=True)
    return outputs.code


@evaluation.command()
@with_options
def frontier(
    *,
    file: Annotated[Path, typer.Option("--json", help="Rows; goes on with one that is there.")],
    model: Annotated[
        str | None, typer.Option(help="Folder of a pipeline; default the embedded model.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG or SVG to write.")] = None,
    density: Annotated[list[float] | None, typer.Option(help="Repeatable.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Repeatable; default all.")] = None,
    cases: Cases,
    held_out: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    size: Size,
    searched_at: Annotated[
        str | None,
        typer.Option(help="Another size, 192x192x15: plans searched there are measured here too."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="File that a language model reads; repeatable. With it --plan."),
    ] = None,
    plan: Annotated[
        list[str] | None, typer.Option(help="Searched plan of a language model; repeatable.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens of a text.")] = 4096,
    place: Place,
) -> int:
    """Quality over density: searched plans against the published methods, on held-out prompts.

    With --text it is for a language model, against rules for its prefill, or for a diffusion language model.
    """
    if text or plan:
        if model is None or not text:
            raise ValueError("rules for language models are compared on --model and --text")
        pictures = cases.given or held_out or searched_at
        if is_denoiser(model):
            if pictures or density or replace(size, steps=None) != Size():
                raise ValueError(
                    "prompts, sizes and --density don't go with a diffusion language model, which is given "
                    "--text, --tokens, --steps, --method and --plan"
                )
            return denoising_frontier(
                model, text, tokens, size.steps, plan or [], method, file, plot, place
            )
        if pictures or size != Size():
            raise ValueError("prompts and sizes are for pipelines, and --text for language models")
        reading = Reading(text, tokens)
        return _text_frontier(model, reading, plan or [], density, method, file, plot, place)
    from ..demo.run import CALIBRATION, HELD_OUT, SETTINGS
    from ..eval.frontier import ALL_METHODS, DENSITIES, FrontierRequest, figure_of, started
    from ..eval.frontier import frontier as measure
    from ..eval.sizes import parse_sizes
    from ..inputs import check_model, described, load_pipeline
    from ..resources import shipped

    if model is not None:
        check_model(model)
    known = {} if model else SETTINGS.to_dict()
    settings = size.settings(known)
    own = not (cases.given or model)
    given = list(CALIBRATION) if own else cases.read()
    later = cases.numbered(held_out, after=len(given))
    if own and not later:
        later = list(HELD_OUT)
    searched_there = None
    if searched_at is not None:
        other, *more = parse_sizes(searched_at)
        if more:
            raise ValueError(f"--searched-at takes one size, got {searched_at!r}")
        searched_there = replace(settings, width=other[0], height=other[1], num_frames=other[2])
    request = FrontierRequest(
        given, later, settings, density or DENSITIES, method or ALL_METHODS, file, searched_there
    )
    name, dtype = model or str(shipped("tiny_wan")), place.dtype or (None if model else "float32")
    outputs = expected(file, plot)
    if (pipe := described(name, place.device, dtype)) is not None:
        started(pipe, request)
    rows = measure(load_pipeline(name, place.device, dtype), request, say, outputs)
    show_frontier(rows)
    return ended(outputs, file, plot, lambda: figure_of(rows))


def _text_frontier(
    model: str,
    reading: Reading,
    plans: list[str],
    density: list[float] | None,
    method: list[str] | None,
    file: Path,
    plot: Path | None,
    place: Place,
) -> int:
    """Compare plans with rules for a language model, and write and show the rows."""
    from ..eval.baselines.text import RULES as TEXT_RULES
    from ..eval.language.frontier import DENSITIES, RULES, LanguageFrontier, figure_of
    from ..eval.language.frontier import frontier as measure
    from ..eval.language.quality import LanguageRequest
    from ..inputs import check_language_model, load_language_model
    from ..plan import Plan

    read = LanguageRequest(texts=reading.texts(), tokens=reading.tokens)
    loaded = [Plan.from_pretrained(name) for name in plans]
    request = LanguageFrontier(
        reading=read,
        plans=dict(zip(told_apart(plans, lambda path: path.stem, "--plan"), loaded, strict=True)),
        densities=density or DENSITIES,
        methods=method or tuple(TEXT_RULES if read.asks else RULES),
        file=file,
    )
    outputs = expected(file, plot)
    check_language_model(model)
    read_model, tokenizer = load_language_model(model, place.device, place.dtype)
    rows = measure(read_model, tokenizer, request, say, outputs)
    show_language_frontier(rows)
    return ended(outputs, file, plot, lambda: figure_of(rows))


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
