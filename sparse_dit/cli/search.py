"""`sparse-dit search`: find a plan for a pipeline or a language model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..outputs import Outputs
from ..tables import out, show_plan
from ..whole_file import uninterrupted
from .options import Cases, Force, Model, Place, ProfileSteps, Size, resumable, say, with_options

if TYPE_CHECKING:
    from ..search import Searched
    from ..search.language import SearchedLanguage


@dataclass(frozen=True)
class Wanted:
    """The options of a search that it takes as they are, by the names of `SearchOptions`."""

    target_speedup: Annotated[float | None, typer.Option(help="Forecast speed-up to reach.")] = None
    max_error: Annotated[float | None, typer.Option(help="Largest error of head outputs.")] = None
    min_psnr: Annotated[float | None, typer.Option(help="Least PSNR on held-out prompts.")] = None
    cache: Annotated[
        str | None,
        typer.Option(
            help="Search together with a step cache: first-block, taylorseer, or one with a number "
            "(first-block=0.12)."
        ),
    ] = None
    profile: Annotated[
        Path | None, typer.Option(help="Where the profile is kept; default beside the plan.")
    ] = None
    profile_steps: ProfileSteps = None
    device_table: Annotated[
        str | None,
        typer.Option(
            "--cost-table",
            help="Solve for another device: name or file of its table; h100, h800, h20 are estimates.",
        ),
    ] = None
    dense_seconds: Annotated[
        float | None, typer.Option(help="Of one dense generation on that device.")
    ] = None


@dataclass(frozen=True)
class Texts:
    """The options of a search for a language model, by the names of `LanguageOptions`."""

    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of text to calibrate a language model on, or what a VLM's processor made of a prompt, "
            "as .safetensors; repeatable."
        ),
    ] = None
    held_out_text: Annotated[
        list[Path] | None, typer.Option(help="File of text to verify it on; repeatable.")
    ] = None
    max_kl: Annotated[
        float | None, typer.Option(help="Most divergence of a language model, in nats a token.")
    ] = None
    max_ppl_increase: Annotated[
        float | None, typer.Option(help="Most relative increase of its perplexity: 0.03 is 3 %.")
    ] = None
    tokens: Annotated[int, typer.Option(help="Most tokens of a text.")] = 4096


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
    wanted: Wanted,
    texts: Texts,
    place: Place,
    force: Force = False,
) -> int:
    """Find a plan for a pipeline. One of --target-speedup, --max-error, --min-psnr is the dial.

    With --text it is for a language model; its dials are --target-speedup, --max-kl, --max-ppl-increase.
    If even the best plan misses it, that one is written, and the exit code is 1.
    """
    if texts.text:
        of_pipelines = replace(wanted, target_speedup=None, profile=None) != Wanted()
        if cases.given or held_out or size != Size() or of_pipelines:
            raise ValueError(
                "prompts, sizes, profile steps, step caches, cost tables, --max-error and --min-psnr are for "
                "pipelines; with --text a language model is searched"
            )
        return _search_text(model, texts, wanted, place, plan_file, force)
    if texts != Texts():
        raise ValueError(
            "--held-out-text, --max-kl, --max-ppl-increase and --tokens are for language models, which need "
            "--text too"
        )
    from ..inputs import check_model, described, load_pipeline
    from ..search import search_plan as find
    from ..search.objective import shortfall
    from ..search.options import SearchOptions, check_profile

    given = cases.read()
    kept = _kept(wanted, plan_file)
    asked: dict[str, Any] = {
        **vars(wanted),
        "settings": size.settings(),
        "held_out": cases.numbered(held_out, after=len(given)) or None,
        "profile": kept,
        "report": say,
    }
    options = SearchOptions(**asked)
    outputs = Outputs(replace=force, say=say)
    outputs.expect("--out", plan_file, ".json", beside=_beside)
    outputs.expect("--profile", kept, again=True)
    check_model(model)
    calibration, _ = options.split(given)
    if (pipe := described(model, place.device, place.dtype)) is not None:
        options.check(pipe, calibration[0])
        check_profile(pipe, calibration, options.profiled, kept)
    pipe = load_pipeline(model, place.device, place.dtype)
    try:
        searched = find(pipe, given, **asked)
    except KeyboardInterrupt:
        resumable(kept)
        raise
    _save(searched, plan_file, outputs, force)
    _tell(kept)
    missed = shortfall(searched.plan)
    if missed:
        say(missed)
    return outputs.code or int(bool(missed))


def _search_text(
    model: str, texts: Texts, wanted: Wanted, place: Place, plan_file: Path, force: bool
) -> int:
    """Find a plan for a language model, and write and show it."""
    from ..inputs import check_language_model, load_language_model, read_texts
    from ..search.language import search_language_plan
    from ..search.language.options import LanguageOptions

    calibration, held_out = read_texts(texts.text or []), read_texts(texts.held_out_text or [])
    kept = _kept(wanted, plan_file)
    asked: dict[str, Any] = {
        "held_out": held_out or None,
        "target_speedup": wanted.target_speedup,
        "max_kl": texts.max_kl,
        "max_ppl_increase": texts.max_ppl_increase,
        "tokens": texts.tokens,
        "profile": kept,
        "report": say,
    }
    LanguageOptions(**asked).split(calibration)
    outputs = Outputs(replace=force, say=say)
    outputs.expect("--out", plan_file, ".json", beside=_beside)
    outputs.expect("--profile", kept, again=True)
    check_language_model(model)
    loaded, tokenizer = load_language_model(model, place.device, place.dtype)
    of_text = any(isinstance(text, str) for text in (*calibration, *held_out))
    try:
        searched = search_language_plan(  # without a tokenizer there are no questions about texts
            loaded, calibration, tokenizer=tokenizer if of_text else None, **asked
        )
    except KeyboardInterrupt:
        resumable(kept)
        raise
    _save(searched, plan_file, outputs, force)
    _tell(kept)
    met = searched.plan.measured["met"]
    if not met:
        say("the plan misses what was asked for; see measured in it")
    return outputs.code or int(not met)


def _kept(wanted: Wanted, plan_file: Path) -> Path:
    """Where a search keeps its profile."""
    return wanted.profile or plan_file.with_name(f"{plan_file.stem}.profile.safetensors")


def _tell(kept: Path) -> None:
    if kept.exists():
        out.print(f"the profile is kept in {kept}", markup=False, highlight=False, soft_wrap=True)


def _beside(plan_file: Path) -> tuple[Path, Path]:
    """What a search writes with a plan."""
    from ..plan.storage import tensor_path
    from ..search.front import front_path

    return tensor_path(plan_file), front_path(plan_file)


def _save(
    searched: Searched | SearchedLanguage, plan_file: Path, outputs: Outputs, force: bool
) -> None:
    """Write the plan and its search's other points, and show it."""
    from ..search.front import front_path, write_front

    with uninterrupted():  # one plan beside another's front would be wrong
        lies = outputs.write(plan_file, lambda path: searched.plan.save(path, overwrite=force))
        front = outputs.put(front_path(lies), lambda path: write_front(searched.front, path))
    show_plan(searched.plan)
    out.print(
        f"wrote {lies} and {front.name} (other points: sparse-dit show --pick)", soft_wrap=True
    )
