"""The options of a search: one object, from which the signatures come."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

import sparse_dit
from sparse_dit.cli.search import Wanted
from sparse_dit.generation import GenerationSettings
from sparse_dit.search import search, search_plan
from sparse_dit.search.options import SearchOptions, TuneOn

SMALL = GenerationSettings(64, 64)


@pytest.mark.parametrize("function", [search, search_plan, sparse_dit.search])
def test_every_option_is_a_typed_keyword(function):
    shown = inspect.signature(function).parameters
    hints = get_type_hints(SearchOptions)
    options = {field.name: (hints[field.name], field.default) for field in fields(SearchOptions)}
    assert list(shown) == ["pipe", "prompts", *options]
    assert options["tune_on"] == (TuneOn, "held_out")
    for name, (kind, default) in options.items():
        parameter = shown[name]
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.annotation == kind
        assert name == "settings" or parameter.default == default


def test_an_option_stands_in_two_files_and_in_the_command_if_it_is_typed():
    package = Path(sparse_dit.__file__).parent
    texts = {f.relative_to(package).as_posix(): f.read_text() for f in package.rglob("*.py")}
    found = {name for name, text in texts.items() if "max_generations" in text}
    assert found == {"search/options.py", "search/engine.py"}
    assert {field.name for field in fields(Wanted)} < {
        field.name for field in fields(SearchOptions)
    }


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({}, "give one of"),
        ({"min_psnr": 30.0, "rows": 0}, "rows must be a whole number"),
        ({"min_psnr": 30.0, "tune_on": "both"}, "tune_on must be one of"),
        ({"min_psnr": 30.0, "profile_steps": 0}, "profile_steps must be"),
        ({"min_psnr": 30.0, "dense_seconds": 3.0}, "give device_table too"),
    ],
)
def test_options_are_checked_when_they_are_made(wrong, text):
    with pytest.raises(ValueError, match=text):
        SearchOptions(settings=SMALL, **wrong)
