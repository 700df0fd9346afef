"""What a person types, read by the program that it is for, which then doesn't run."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from sparse_dit.cli import app
from tests.helpers.documents import ELLIPSES, ROOT

USAGE: Any = typer.BadParameter.__mro__[1]  # click's UsageError, wherever typer has click from


def read(words: list[str]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """A command of `sparse-dit` by name, and its parameters.

    Raises:
        USAGE: An unknown command or option, a value of another type, something missing.
    """
    command: Any = typer.main.get_command(app)
    context, names = command.make_context("sparse-dit", list(words)), []
    while isinstance(command, TyperGroup):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
        names.append(name)
    return tuple(names), context.params


def lacks(words: list[str]) -> list[str]:
    """What a command that is read without error but for that must still be given, as `read` would take it."""
    added: list[str] = []
    while True:
        try:
            read([*words, *added])
        except USAGE as error:
            parameter: Any = getattr(error, "param", None)
            if type(error).__name__ == "NoArgsIsHelpError":
                return ["a command"]
            if type(error).__name__ != "MissingParameter" or len(added) > 6:
                raise
            option = [] if parameter.param_type_name == "argument" else [parameter.opts[0]]
            added += [*option, "1"]
        else:
            return added


def without_ellipses(words: list[str]) -> list[str]:
    """What is written out; an ellipsis that is an option's value stays."""
    return [
        word
        for before, word in zip(["", *words], words, strict=False)
        if word not in ELLIPSES or before.startswith("--")
    ]


class _Read(BaseException):
    """Instead of what the program does with its arguments; not even `except Exception` stops it."""


def read_by_program(words: list[str]) -> None:
    """A Python program of this project by `-m MODULE` or FILE takes these words.

    Raises:
        ValueError: It doesn't, with what it says; or it isn't there.
    """
    take = argparse.ArgumentParser.parse_args

    def and_stop(self: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        take(self, *given, **named)
        raise _Read

    said = io.StringIO()
    argparse.ArgumentParser.parse_args = and_stop  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stderr(said):
            run_program(words)
    except _Read:
        return
    except SystemExit:
        raise ValueError(said.getvalue().strip().splitlines()[-1]) from None
    finally:
        argparse.ArgumentParser.parse_args = take  # type: ignore[method-assign]
    raise AssertionError(f"{words} parsed no arguments and so ran: run it, or say why not")


def run_program(words: list[str]) -> None:
    """`python` with these words, in this process."""
    program = words[1] if words[0] == "-m" else words[0]
    file = program_file(words)
    with arguments([program, *words[2 if words[0] == "-m" else 1 :]]):
        if words[0] == "-m":
            with warnings.catch_warnings():  # another test may have imported the program already
                warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
                runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:  # Python looks beside a script for what it imports
            sys.path.insert(0, str(file.parent))
            try:
                runpy.run_path(str(file), run_name="__main__")
            finally:
                sys.path.remove(str(file.parent))


def program_file(words: list[str]) -> Path:
    """Where it is.

    Raises:
        ValueError: Nowhere.
    """
    module = words[0] == "-m"
    name = f"{words[1].replace('.', '/')}.py" if module else words[0]
    if not (ROOT / name).is_file():
        raise ValueError(f"there is no {name}")
    return ROOT / name


@contextlib.contextmanager
def arguments(words: list[str]) -> Iterator[None]:
    """`sys.argv` meanwhile."""
    before = sys.argv
    sys.argv = list(words)
    try:
        yield
    finally:
        sys.argv = before


def command_names() -> list[str]:
    """The first words of commands."""
    return list(getattr(typer.main.get_command(app), "commands", {}))


def known_options() -> set[str]:
    """Every option of every command and of the programs of this project."""
    found, waiting = set(), [typer.main.get_command(app)]
    while waiting:
        command: Any = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        for parameter in command.params:
            found.update([*parameter.opts, *parameter.secondary_opts])
    for folder in ("benchmarks", "demos", "search", "tests", "sparse_dit/search"):
        for file in (ROOT / folder).rglob("*.py"):
            found.update(re.findall(r'add_argument\(\s*"(--[\w-]+)"', file.read_text("utf-8")))
    return {option for option in found if option.startswith("--")}
