"""The finished job that the page shows where nothing was generated yet; it ships with the package."""

from __future__ import annotations

import functools
from datetime import date
from pathlib import Path

from pydantic import BaseModel

from .answers import Video
from .media import VARIANTS

STATIC = Path(__file__).parent / "static"
FILE = STATIC / "example.json"
SHOWN = ("video", "dense")  # variants that ship


class Example(BaseModel):
    """A job of another server.

    Attributes:
        video: The job as that server described it.
        machine: Its processor, with the number of threads.
        made: The day.
    """

    video: Video
    machine: str
    made: date


def example_name(variant: str) -> str:
    """The name of a variant's file among the static ones."""
    return f"example-{VARIANTS[variant][0]}"


@functools.cache
def shipped_example() -> Example:
    """The example of this installation."""
    return Example.model_validate_json(FILE.read_text(encoding="utf-8"))
