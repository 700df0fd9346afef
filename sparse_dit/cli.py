"""The command line: demo, profile, search, check, stability, show, diff, eval, bench, doctor.

Exit codes: 0 done, 1 something failed (and `search`: the best plan misses what was asked for; `check`:
heads left their error; `diff`: plans differ; `doctor`: a backend is broken), 2 bad input, 130 stopped by
Ctrl-C. Heavy imports live inside the commands, so that help is fast.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from .bench.command import app as bench
from .checking import check as check_command
from .doctor_command import doctor as doctor_command
from .eval.cli import evaluation
from .options import (
    Device,
    Dtype,
    Force,
    Frames,
    Guidance,
    Height,
    Model,
    ProfileSteps,
    Prompt,
    Prompts,
    Seed,
    Steps,
    Text,
    Width,
    err,
    say,
    settings_of,
)
from .profile_command import profile as profile_command
from .stability import stability as stability_command
from .tables import out, show_front, show_heads, show_models, show_plan

app = typer.Typer(
    help="Faster video diffusion: search a plan of sparse attention, look at it, measure it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
app.add_typer(bench, name="bench")
app.command("check")(check_command)
app.command("stability")(stability_command)
app.command("profile")(profile_command)
app.command("doctor")(doctor_command)
app.add_typer(evaluation, name="eval")


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Options of all commands; `run` reads --debug itself, wherever it stands."""


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("out"),
    force: Force = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller and sooner, not the demo.")
    ] = False,
) -> None:
    """Search, verify and show a plan for the embedded model."""
    from .demo.run import run_demo

    try:
        run_demo(folder, force=force, quick=quick)
    except KeyboardInterrupt:
        _resumable(folder / "profile.safetensors")
        raise


@app.command()
def search(
    model: Model,
    plan_file: Annotated[Path, typer.Option("--out", help="Plan to write.")] = Path("plan.json"),
    prompt: Prompt = None,
    prompts: Prompts = None,
    held_out: Annotated[
        list[str] | None, typer.Option(help="A prompt to verify on; repeatable.")
    ] = None,
    height: Height = None,
    width: Width = None,
    num_frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    max_sequence_length: Text = None,
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
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    force: Force = False,
) -> None:
    """Find a plan for a pipeline. One of --target-speedup, --max-error, --min-psnr is the dial.

    If even the best plan misses it, that one is written, and the exit code is 1.
    """
    from .generation import Case
    from .inputs import check_device, check_model, load_pipeline, read_prompts

    texts = read_prompts(prompt or [], prompts)
    settings = settings_of({}, height, width, num_frames, steps, guidance, max_sequence_length)
    dial: dict[str, Any] = {
        "target_speedup": target_speedup,
        "max_error": max_error,
        "min_psnr": min_psnr,
    }
    from .search import Objective
    from .search import search_plan as find
    from .search.elsewhere import Elsewhere
    from .search.front import front_path, write_front
    from .search.objective import shortfall

    Objective(**dial)
    Elsewhere.of(cost_table, dense_seconds)
    if plan_file.suffix != ".json":
        raise ValueError(f"a plan file must end in .json, got {plan_file.name!r}")
    if plan_file.exists() and not force:
        raise FileExistsError(f"{plan_file} exists already: pass --force to replace it")
    check_model(model)
    check_device(device)
    kept = profile or plan_file.with_name(f"{plan_file.stem}.profile.safetensors")
    pipe = load_pipeline(model, device, dtype)
    kept.parent.mkdir(parents=True, exist_ok=True)
    cases: list[str | Case] = [Case(text, seed + i) for i, text in enumerate(texts)]
    later = [Case(text, seed + len(cases) + i) for i, text in enumerate(held_out or [])]
    try:
        searched = find(
            pipe,
            cases,
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
        _resumable(kept)
        raise
    plan = searched.plan
    plan.save(plan_file, overwrite=force)
    write_front(searched.front, front_path(plan_file))
    show_plan(plan)
    out.print(
        f"wrote {plan_file} and {front_path(plan_file).name} (other points: sparse-dit show --pick); "
        f"the profile is kept in {kept}",
        soft_wrap=True,
    )
    if missed := shortfall(plan):
        say(missed)
        raise typer.Exit(1)


@app.command()
def show(
    plan: Annotated[str, typer.Argument(help="Plan: file, folder, built-in name or hub id.")],
    heads: Annotated[bool, typer.Option("--heads", help="Every head of every layer.")] = False,
    front: Annotated[bool, typer.Option("--front", help="The other points of its search.")] = False,
    picture: Annotated[Path | None, typer.Option(help="With --front: PNG or SVG to write.")] = None,
    pick: Annotated[
        str | None,
        typer.Option(help="Take another point: speedup=2.0, density=0.3, error=0.05, psnr=30."),
    ] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--out", help="With --pick: plan to write.")
    ] = None,
    force: Force = False,
) -> None:
    """Show a plan as a table; or other points of the search that it comes from."""
    from .plan import Plan

    if (pick is None) != (plan_file is None):
        raise ValueError("--pick and --out go together: which point, and the plan file to write")
    if pick or front:
        _show_points(plan, front, picture, pick, plan_file, force)
        return
    loaded = Plan.from_pretrained(plan)
    show_plan(loaded)
    if heads:
        show_heads(loaded)


def _show_points(
    plan: str,
    front: bool,
    picture: Path | None,
    pick: str | None,
    plan_file: Path | None,
    force: bool,
) -> None:
    """`show --front` and `show --pick`."""
    from .plan import Plan
    from .search import front as fronts

    loaded = Plan.from_pretrained(plan)
    file = Path(plan) / "plan.json" if Path(plan).is_dir() else Path(plan)
    found = fronts.read_front(fronts.front_path(file))
    if pick and plan_file:
        other = fronts.pick(loaded, found, *fronts.wish(pick))
        other.save(plan_file, overwrite=force)
        show_plan(other)
        out.print(f"wrote {plan_file}", markup=False, highlight=False, soft_wrap=True)
    if front:
        show_front(found)
        if picture is not None:
            from .eval.front import figure_of

            figure_of(found, loaded).savefig(picture, facecolor="white")
            out.print(f"wrote {picture}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="Plan.")], b: Annotated[str, typer.Argument(help="Plan.")]
) -> None:
    """What changed from plan A to plan B; exit code 1 if anything did."""
    from .plan import Plan
    from .plan import diff as differences

    lines = differences(Plan.from_pretrained(a), Plan.from_pretrained(b))
    for line in lines or ["the plans are equal"]:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    if lines:
        raise typer.Exit(1)


@app.command()
def models() -> None:
    """Transformers that can be patched, and what was tested of each."""
    from .models import supported_models

    show_models(supported_models())


def main() -> None:
    """Entry point of `sparse-dit`."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command line; errors become one line on stderr and an exit code."""
    debug = "--debug" in arguments
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # their advice isn't the user's concern here
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        code = app([a for a in arguments if a != "--debug"], standalone_mode=False)
        code = code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _explain(error)
    if code == 130:  # Ctrl-C, whether typer or we caught it
        err.print("stopped")
    return code


def _explain(error: Exception) -> int:
    """Print an error in one line and give its exit code."""
    usage = typer.BadParameter.__mro__[2]  # click's ClickException, wherever typer has click from
    if isinstance(error, usage):
        text: str = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
        if not text.strip():  # no arguments at all: help has been printed
            return 2
        code, words = 2, text
    elif isinstance(error, ImportError) and "sparse_dit" not in (error.name or ""):
        code, words = 2, f"{error}: install what is missing with pip install 'sparse_dit[all]'"
    elif isinstance(error, ValueError | TypeError | OSError | NotImplementedError):
        code, words = 2, str(error)
    else:
        code, words = 1, f"{type(error).__name__}: {error} (--debug shows where)"
    line = " ".join(words.split())
    err.print(f"error: {line}", markup=False, highlight=False, soft_wrap=True)
    return code


def _resumable(profile: Path) -> None:
    if profile.exists():
        say(f"the same command goes on from {profile}")


if __name__ == "__main__":
    main()
