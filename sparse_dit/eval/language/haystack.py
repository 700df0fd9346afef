"""Text that any machine has: sources and documentation in Python's standard library, and what is drawn.

It differs between versions of Python, so that figures of two versions are of different texts.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import re
from collections.abc import Iterator
from random import Random

from ...search.language.reading import FILLER

MODULES = ("tarfile", "_pydecimal")  # sources that are read where no text is given
CITIES = ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Prague", "Dublin", "Oslo")
CITIES += ("Athens", "Lisbon", "Warsaw", "Moscow", "Cairo", "Tokyo", "Delhi", "Sydney", "Boston")
NAMES = ("Anna", "Peter", "Maria", "James", "Laura", "David", "Sarah", "Thomas", "Julia", "Robert")
TRADES = ("baker", "doctor", "farmer", "lawyer", "painter", "pilot", "singer", "teacher", "writer")


def sources() -> dict[str, str]:
    """Sources of the standard library, by name.

    Raises:
        ValueError: If this Python has none; the user must give texts.
    """
    try:
        found = {name: inspect.getsource(importlib.import_module(name)) for name in MODULES}
    except (OSError, ImportError) as error:
        raise ValueError(
            f"this Python has no sources of its standard library ({error}): give --text FILE"
        ) from None
    return {f"{name}.py": text for name, text in found.items()}


@functools.cache
def sentences() -> tuple[str, ...]:
    """Prose: sentences of Python's own language reference, in order.

    Raises:
        ValueError: If this Python comes without it.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise ValueError(
            f"this Python has no documentation in it ({error}): leave the tasks out with --tasks none"
        ) from None
    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    found = re.split(r"(?<=[.:]) (?=[A-Z])", text)
    return tuple(s for s in found if re.fullmatch(r"[A-Z][\w ,.()'-]{40,240}[.:]", s))


@functools.cache
def words() -> tuple[str, ...]:
    """Words of that prose, four to nine letters, sorted."""
    found = re.findall(r"\b[a-z]{4,9}\b", " ".join(sentences()))
    return tuple(sorted(set(found)))


def noise() -> Iterator[str]:
    """The same few sentences again and again, without end."""
    return itertools.cycle(re.findall(r"[A-Z][^.]+\.", FILLER))


def prose(draw: Random) -> Iterator[str]:
    """Sentences in order from a random one on, without end."""
    said = sentences()
    return itertools.islice(itertools.cycle(said), draw.randrange(len(said)), None)


def coined(draw: Random) -> str:
    """A word that is none, of three syllables."""
    return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3))


def person(draw: Random) -> str:
    """A name that hardly comes twice."""
    return f"{draw.choice(NAMES)} {coined(draw).title()}"
