"""What `sparse-dit show` prints: a row for each stage, and every head with its runner-up."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from sparse_dit import tables
from sparse_dit.index import pattern_index
from tests.helpers.eval_cases import made_up_plan


@pytest.fixture
def printed(monkeypatch):
    """Everything that was printed, on lines that are long enough."""
    console = Console(width=200, record=True, file=io.StringIO())
    monkeypatch.setattr(tables, "out", console)
    return console.export_text


def cells(text, first):
    """Cells of the rows whose first column says so."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    return [row for row in rows if row and row[0] == first]


def test_a_stage_shows_its_steps_density_and_patterns(printed):
    plan = replace(made_up_plan(), provenance={"stage_shares": {"transformer": [0.25, 0.75]}})
    tables.show_plan(plan)
    dense, sparse = cells(printed(), "transformer")
    assert dense[1:] == ["1 to 0.9", "any", "25%", "8", "1.000", "dense 8", "0.000", "0.000"]
    part = plan.components["transformer"]
    heads = part.layers["blocks.0.attn1"][1]
    density = sum(pattern_index(head.pattern, part.layout).density for head in heads) / len(heads)
    assert sparse[3:6] == ["75%", "8", f"{density:.3f}"]
    assert sparse[6:] == ["window+far 4, stripe 2, tile 2", "0.075", "0.150"]


@pytest.mark.parametrize("shares", [None, [], {"transformer": [1.0]}, {"transformer": ["a", "b"]}])
def test_steps_that_are_not_noted_are_a_dash(printed, shares):
    tables.show_plan(replace(made_up_plan(), provenance={"stage_shares": shares}))
    assert [row[3] for row in cells(printed(), "transformer")] == ["-", "-"]


def test_a_head_shows_its_runner_up_and_its_error(printed):
    plan = made_up_plan(layers=1)
    tables.show_heads(plan)
    rows = cells(printed(), "blocks.0.attn1")
    assert len(rows) == 8
    assert rows[0][3:] == ["1.000", "dense", "0.000", "-", "-"]
    choice = plan.components["transformer"].layers["blocks.0.attn1"][1][2]
    assert rows[6][4:] == [str(choice.pattern), "0.100", str(choice.runner_up), "0.140"]
