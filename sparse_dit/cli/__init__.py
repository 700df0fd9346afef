"""The command line: demo, plan, plans, profile, search, check, stability, show, diff, eval, bench, doctor.

Exit codes: 0 done, 1 something failed (and `search`: the best plan misses what was asked for; `check`:
heads left their error; `diff`: plans differ; `doctor`: a backend is broken), 2 bad input, 3 done, but a
result lies elsewhere than asked for, 130 stopped by Ctrl-C. Heavy imports live inside the commands, so
that help is fast.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from ..tables import out, show_models
from ..words import command_line
from .bench import app as bench
from .check import check as check_command
from .demo import demo as demo_command
from .doctor import doctor as doctor_command
from .eval import evaluation
from .options import err
from .plan import plan as plan_command
from .plans import plans as plans_command
from .profile import profile as profile_command
from .search import search as search_command
from .serve import serve as serve_command
from .show import show as show_command
from .stability import stability as stability_command

app = typer.Typer(
    help="Faster video diffusion: search a plan of sparse attention, look at it, measure it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
app.add_typer(bench, name="bench")
app.command("demo")(demo_command)
app.command("check")(check_command)
app.command("search")(search_command)
app.command("serve")(serve_command)
app.command("show")(show_command)
app.command("stability")(stability_command)
app.command("plan")(plan_command)
app.command("plans")(plans_command)
app.command("profile")(profile_command)
app.command("doctor")(doctor_command)
app.add_typer(evaluation, name="eval")


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Options of all commands; `run` reads --debug itself, wherever it stands."""


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="Plan.")], b: Annotated[str, typer.Argument(help="Plan.")]
) -> None:
    """What changed from plan A to plan B; exit code 1 if anything did."""
    from ..plan import Plan
    from ..plan import diff as differences

    lines = differences(Plan.from_pretrained(a), Plan.from_pretrained(b))
    for line in lines or ["the plans are equal"]:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    if lines:
        raise typer.Exit(1)


@app.command()
def models() -> None:
    """Models that can be patched, and what was tested of each."""
    from ..models import supported_models

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
