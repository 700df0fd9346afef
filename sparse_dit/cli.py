"""The command line: demo, plan, profile, search, check, stability, show, diff, eval, bench, doctor.

Exit codes: 0 done, 1 something failed (and `search`: the best plan misses what was asked for; `check`:
heads left their error; `diff`: plans differ; `doctor`: a backend is broken), 2 bad input, 3 done, but a
result lies elsewhere than asked for, 130 stopped by Ctrl-C. Heavy imports live inside the commands, so
that help is fast.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from .bench.command import app as bench
from .checking import check as check_command
from .doctor_command import doctor as doctor_command
from .eval.cli import evaluation
from .options import Force, err, resumable, say
from .outputs import Outputs
from .plan_command import plan as plan_command
from .profile_command import profile as profile_command
from .search_command import search as search_command
from .stability import stability as stability_command
from .tables import out, show_front, show_heads, show_models, show_plan
from .words import command_line

app = typer.Typer(
    help="Faster video diffusion: search a plan of sparse attention, look at it, measure it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
app.add_typer(bench, name="bench")
app.command("check")(check_command)
app.command("search")(search_command)
app.command("stability")(stability_command)
app.command("plan")(plan_command)
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
) -> int:
    """Search, verify and show a plan for the embedded model."""
    from .demo.run import run_demo

    outputs = Outputs(replace=force, say=say)
    try:
        run_demo(folder, force=force, quick=quick, outputs=outputs)
    except KeyboardInterrupt:
        written = (folder / "plan.json").exists()  # a first one, or of an earlier demo
        resumable(folder / "profile.safetensors", " with --force" if written else "")
        raise
    return outputs.code


@app.command()
def show(
    plan: Annotated[str, typer.Argument(help="Plan: file, folder, built-in name or hub id.")],
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
    force: Force = False,
) -> int:
    """Show a plan as a table; or other points of the search that it comes from."""
    from .plan import Plan

    if (pick is None) != (plan_file is None):
        raise ValueError("--pick and --out go together: which point, and the plan file to write")
    if pick or front or picture:
        return _show_points(plan, front, picture, pick, plan_file, force)
    loaded = Plan.from_pretrained(plan)
    show_plan(loaded)
    if heads:
        show_heads(loaded)
    return 0


def _show_points(
    plan: str,
    front: bool,
    picture: Path | None,
    pick: str | None,
    plan_file: Path | None,
    force: bool,
) -> int:
    """`show --front`, `show --picture` and `show --pick`."""
    from .plan import Plan
    from .plan.storage import tensor_path
    from .search import front as fronts

    outputs = Outputs(replace=force, say=say)
    if plan_file is not None:
        outputs.expect("--out", plan_file, ".json", beside=lambda path: [tensor_path(path)])
    if picture is not None:
        outputs.expect("--picture", picture, ".png", ".svg")
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
        from .eval.figures import save_figure
        from .eval.front import figure_of

        figure = figure_of(found, loaded)
        lies = outputs.write(picture, lambda path: save_figure(figure, path))
        out.print(f"wrote {lies}", markup=False, highlight=False, soft_wrap=True)
    return outputs.code


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
        with command_line():
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
    elif isinstance(error, OSError) and error.errno and error.filename:
        code, words = 2, f"{error.filename}: {error.strerror}"
    elif isinstance(error, ValueError | TypeError | OSError | NotImplementedError):
        code, words = 2, str(error)
    else:
        code, words = 1, f"{type(error).__name__}: {error} (--debug shows where)"
    line = " ".join(words.split())
    err.print(f"error: {line}", markup=False, highlight=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    main()
