"""Heads that look elsewhere on another prompt are told from those that don't."""

import pytest
import torch

from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Stencil, Union, Vertical
from sparse_dit.search.cells import cell_table
from sparse_dit.search.dependence import depends, prompt_dependence
from sparse_dit.search.profile import HALF, LATER, ComponentProfile
from sparse_dit.search.seen import relative_cells
from sparse_dit.search.statistics import COUNT, empty_statistics, of_head

LAYOUT = TokenLayout.video(8, 16, 16)
CUBE = (4, 4, 4)
KEY = (0, "layer")


def _head(offset, column):
    """Statistics of a head for which one offset and one column of tiles matter."""
    statistics = of_head(empty_statistics(LAYOUT, [CUBE], 1)[CUBE], 0)
    table = cell_table(LAYOUT, CUBE)
    statistics["offset_count"].view(-1).index_add_(
        0, relative_cells(LAYOUT, CUBE).flatten(), torch.ones(len(table.tokens) ** 2)
    )
    statistics["offset_far"] += 1e-3
    statistics["offset_far"][tuple((torch.tensor(offset) + table.counts - 1).tolist())] = 100.0
    statistics["column"] += 1e-3
    statistics["column"][column] = 100.0
    return statistics


def _layer(heads, names=("offset_far", "offset_count", "column")):
    """Tensors of a layer, from those of its heads."""
    stacked = {name: torch.stack([head[name] for head in heads]) for name in names}
    return stacked | {COUNT: heads[0][COUNT]}


def _profile(found, later, half=None):
    """Of heads as one prompt finds them and another does; half of the first one's rows look alike."""
    part = ComponentProfile("Model", "0" * 64, {"layer": (len(found), 8)}, LAYOUT, [0.5], ["layer"])
    halves = {name: value / 2 for name, value in _layer(found).items()}
    part.looks[(HALF, *KEY)] = halves if half is None else _layer(half)
    part.looks[(LATER, *KEY)] = _layer(later)
    part.found[KEY] = {CUBE: _layer(found, list(found[0]))}
    return part


def test_heads_that_move_with_the_prompt_are_told():
    one = [_head((0, 1, 0), 13), _head((0, 1, 0), 13), _head((0, 1, 0), 13)]
    two = [_head((0, 1, 0), 13), _head((0, 1, 0), 20), _head((0, 0, 1), 13)]
    regret = prompt_dependence(_profile(one, two))[KEY]
    assert regret.shape == (3, 2)
    moved = torch.tensor([[0, 0], [0, 1], [1, 0]], dtype=torch.bool)
    assert (regret[moved] > 0.5).all() and (regret[~moved] < 1e-6).all()


def test_what_two_halves_of_the_rows_differ_by_is_no_dependence():
    one, two = [_head((0, 1, 0), 13)], [_head((0, 0, 1), 20)]
    noisy = [{name: value.clone() for name, value in two[0].items()}]
    steady, unsteady = (prompt_dependence(_profile(one, two, h))[KEY] for h in (None, noisy))
    assert (steady > 0.5).all() and (unsteady < steady).all()


def test_levels_that_were_not_scored_are_left_out():
    part = _profile([_head((0, 0, 0), 0)], [_head((0, 0, 0), 0)])
    part.looks.pop((LATER, *KEY))
    assert prompt_dependence(part) == {}


@pytest.mark.parametrize(
    ("regret", "shape", "marked"),
    [
        ((0.5, 0.0), Stencil(((0, 0, 0, 1),)), True),
        ((0.0, 0.5), Stencil(((0, 0, 0, 1),)), False),
        ((0.5, 0.0), Vertical((2, 4, 4), (3,)), False),
        ((0.0, 0.5), Vertical((2, 4, 4), (3,)), True),
        ((0.0, 0.5), Union((Stencil(((0, 0, 0, 1),)), Vertical((2, 4, 4), (3,)))), True),
        ((0.5, 0.5), Dense(), False),
        ((0.05, 0.05), Stencil(((0, 0, 0, 1),)), False),
    ],
    ids=str,
)
def test_a_head_is_marked_by_what_its_pattern_is_made_of(regret, shape, marked):
    assert depends(torch.tensor(regret), Pattern(shape)) is marked
