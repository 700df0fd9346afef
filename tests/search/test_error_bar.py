"""The error bar of a forecast against how forecasts really scatter over drawn rows."""

import math
import statistics

import pytest
import torch

from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Pattern, SlidingTile, Window
from sparse_dit.plan import Stage
from sparse_dit.search.candidates import DENSE
from sparse_dit.search.cells import sample_rows, sampled_rows
from sparse_dit.search.nested import Candidates
from sparse_dit.search.profile import ComponentProfile
from sparse_dit.search.provenance import loss_error
from sparse_dit.search.solve import Problem, evaluate
from sparse_dit.search.statistics import score_all

LAYOUT = TokenLayout.video(4, 16, 16)
CUBE = (4, 4, 4)
CANDIDATES = Candidates(
    [DENSE, Pattern(Window(1, 4, 4), CUBE), Pattern(SlidingTile(None, 3, 1), CUBE)]
)
LAYERS = ("a", "b")
PICK = torch.tensor([1, 2, 1, 1])


def _heads():
    generator = torch.Generator().manual_seed(0)
    return {
        layer: [
            [torch.randn(LAYOUT.seq_len, 8, generator=generator) for _ in range(3)]
            for _ in range(2)
        ]
        for layer in LAYERS
    }


def _profile(heads, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    part = ComponentProfile(
        "Model", "0" * 64, dict.fromkeys(LAYERS, (2, 8)), LAYOUT, [0.5], list(LAYERS)
    )
    for layer, parts in heads.items():
        drawn = sample_rows(LAYOUT, rows, generator)
        scores = []
        for q, k, v in parts:
            sampled = sampled_rows(q[None], k[None], v[None], drawn, 1.0, LAYOUT.seq_len)
            scores.append([*score_all(sampled, CANDIDATES, LAYOUT), torch.tensor(float(rows))])
        names = ("error", "error_squared", "recall", "norm", "rows")
        columns = zip(*scores, strict=True)
        part.scores[0, layer] = {n: torch.stack(c) for n, c in zip(names, columns, strict=True)}
    return part


def _problem(part):
    units = [(0, layer, head) for layer in LAYERS for head in range(2)]
    error = torch.cat([part.relative_error(0, layer) for layer in LAYERS]).double()
    ones, importance = torch.ones_like(error), torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    return Problem(
        units, [CANDIDATES] * 4, importance, ones, ones[:, 0], error, ones, ones, ones[:, 0],
        (Stage(1.0, 0.0),), 0.0, ("model",),
    )  # fmt: skip


@pytest.mark.parametrize("rows", [16, 64])
def test_the_bar_is_as_wide_as_forecasts_scatter(rows):
    heads, losses, bars = _heads(), [], []
    for seed in range(60):
        part = _profile(heads, rows, seed)
        task = _problem(part)
        losses.append(evaluate(task, PICK).loss)
        bars.append(loss_error({"model": part}, task, PICK))
    scatter = statistics.stdev(losses)
    assert 0.7 * scatter < statistics.mean(bars) < 2 * scatter


def test_the_bar_shrinks_with_the_root_of_the_rows_and_is_zero_for_dense():
    heads = _heads()
    few, many = (_profile(heads, rows, 0) for rows in (16, 256))
    ratio = loss_error({"model": few}, _problem(few), PICK) / loss_error(
        {"model": many}, _problem(many), PICK
    )
    assert ratio == pytest.approx(math.sqrt(16), rel=0.4)
    assert loss_error({"model": few}, _problem(few), torch.zeros_like(PICK)) == 0


def test_what_is_not_in_the_profile_is_refused():
    part = _profile(_heads(), 16, 0)
    task = _problem(part)
    with pytest.raises(ValueError, match="3 candidates, got number 3"):
        loss_error({"model": part}, task, torch.tensor([3, 0, 0, 0]))
    del part.scores[0, "b"]
    with pytest.raises(ValueError, match="b at noise level 0 isn't in the profile"):
        loss_error({"model": part}, task, PICK)
