"""Heads that look elsewhere on another prompt are told from those that don't."""

import pytest
import torch

from sparse_dit.layout import TokenLayout
from sparse_dit.search.cells import cell_table
from sparse_dit.search.dependence import prompt_dependence
from sparse_dit.search.profile import ComponentProfile
from sparse_dit.search.statistics import empty_statistics, relative_cells

LAYOUT = TokenLayout.video(8, 16, 16)
CUBE = (4, 4, 4)
KEY = (0, "layer")


def _head(offset, column):
    """Statistics of a head for which one offset and one column of tiles matter."""
    statistics = empty_statistics(LAYOUT, CUBE)
    table = cell_table(LAYOUT, CUBE)
    statistics["offset_count"].view(-1).index_add_(
        0, relative_cells(LAYOUT, CUBE).flatten(), torch.ones(len(table.tokens) ** 2)
    )
    statistics["offset_far"] += 1e-3
    statistics["offset_far"][tuple((torch.tensor(offset) + table.counts - 1).tolist())] = 100.0
    statistics["column"] += 1e-3
    statistics["column"][column] = 100.0
    return {CUBE: statistics}


def _profile(*heads):
    part = ComponentProfile("Model", "0" * 64, len(heads), 8, LAYOUT, [0.5], ["layer"])
    part.found[KEY] = list(heads)
    return part


def test_heads_that_move_with_the_prompt_are_marked():
    one = _profile(_head((0, 1, 0), 3), _head((0, 1, 0), 3), _head((1, 0, 2), 3))
    two = _profile(_head((0, 1, 0), 3), _head((0, 1, 0), 20), _head((-1, 2, 0), 3))
    regret = prompt_dependence([one, two], CUBE, budget=0.06)[KEY]
    assert regret.shape == (3, 2)
    moved = torch.tensor([[0, 0], [0, 1], [1, 0]], dtype=torch.bool)
    assert (regret[moved] > 0.9).all() and (regret[~moved] < 1e-6).all()


def test_a_budget_that_holds_both_choices_leaves_no_regret():
    one, two = _profile(_head((1, 0, 2), 3)), _profile(_head((-1, 2, 0), 20))
    assert prompt_dependence([one, two], CUBE, budget=1.0)[KEY].max() < 1e-6


def test_profiles_that_cannot_be_compared_are_refused():
    one = _profile(_head((0, 0, 0), 0))
    with pytest.raises(ValueError, match="needs two profiles or more, got 1"):
        prompt_dependence([one], CUBE)
    with pytest.raises(ValueError, match="same size, noise levels and layers"):
        prompt_dependence([one, ComponentProfile("Model", "0" * 64, 1, 8, LAYOUT)], CUBE)
