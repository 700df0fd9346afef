"""The choice among candidates: against brute force on tiny problems, and its dials."""

import dataclasses
import itertools

import pytest
import torch

from sparse_dit.eval.baselines.uniform import random_choice, uniform_pattern
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Skip, Window
from sparse_dit.plan import Stage
from sparse_dit.search import Objective
from sparse_dit.search.candidates import tilings
from sparse_dit.search.cells import cell_table, sample_rows
from sparse_dit.search.cost import CostTable, break_even_tokens, measure_cost, rising
from sparse_dit.search.profile import ComponentProfile
from sparse_dit.search.seen import density
from sparse_dit.search.sensitivity import Sensitivity, filled
from sparse_dit.search.solve import (
    Problem,
    at_price,
    cheapest,
    evaluate,
    least_loss,
    problem,
    runner_up,
    stages_of,
)
from sparse_dit.search.statistics import discover, empty_statistics
from tests.helpers.search_cases import cell_sums

PATTERNS = (Pattern(Dense()), Pattern(Skip()), Pattern(Window(0)), Pattern(Window(1), far=True))
LAYOUT = TokenLayout.video(8, 16, 16)


MATTERS = Sensitivity([2.0, 0.5], [0.5, 0.5])


def _problem(units=4, candidates=4, seed=0, other=0.5):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    error = draw(units, candidates)
    error[:, 0] = 0
    seconds = draw(units, candidates)
    seconds[:, 0] = 1
    dens = draw(units, candidates)
    dens[:, 0] = 1
    return Problem(
        [(0, "blocks.0.attn1", head) for head in range(units)],
        [PATTERNS[:candidates]] * units,
        0.1 + draw(units),
        seconds,
        seconds[:, 0],
        error,
        dens,
        1 - error,
        torch.full((units,), 1 / units, dtype=torch.float64),
        (Stage(1.0, 0.0),),
        other,
    )


def _all_choices(task):
    units, count = task.density.shape
    for picks in itertools.product(range(count), repeat=units):
        yield evaluate(task, torch.tensor(picks))


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_beats_the_hull(seed):
    task = _problem(seed=seed)
    every = list(_all_choices(task))
    for price in (0.0, 0.1, 1.0, 3.0, 100.0):
        best = at_price(task, price)
        least = min(c.seconds + price * c.loss for c in every)
        assert best.seconds + price * best.loss == pytest.approx(least)
        dominated = [c for c in every if c.seconds < best.seconds and c.loss < best.loss]
        assert not dominated


@pytest.mark.parametrize("seed", range(5))
def test_a_looser_loss_is_never_slower(seed):
    task, previous = _problem(units=8, seed=seed), float("inf")
    for limit in (0.0, 0.05, 0.2, 0.5, 1.0, 10.0):
        choice = cheapest(task, lambda c, limit=limit: c.loss <= limit)
        assert choice.loss <= limit and choice.seconds <= previous
        previous = choice.seconds
    assert choice.seconds == pytest.approx(at_price(task, 0).seconds)
    assert cheapest(task, lambda c: False).pick.eq(0).all()


@pytest.mark.parametrize("seed", range(5))
def test_least_loss_reaches_the_speedup_and_is_on_the_hull(seed):
    task = _problem(seed=seed)
    every = list(_all_choices(task))
    fastest, previous = at_price(task, 0.0).speedup, -1.0
    for share in (0.1, 0.5, 0.9, 0.999):
        wanted = 1 + (fastest - 1) * share
        choice = least_loss(task, wanted)
        assert choice.speedup >= wanted and choice.loss >= previous
        previous = choice.loss
        assert not [c for c in every if c.speedup > choice.speedup and c.loss < choice.loss]
    assert least_loss(task, fastest * 1.01) is None


def test_out_of_reach_is_said_in_one_line():
    task = _problem()
    with pytest.raises(
        ValueError, match=r"target_speedup 50 is out of reach.*forecasts 2\.81x"
    ) as e:
        Objective(target_speedup=50).choose(task, 0.0)
    assert "\n" not in str(e.value)


def test_all_is_dense_where_sparse_is_slower():
    task = _problem()
    slow = dataclasses.replace(task, seconds=torch.ones_like(task.seconds) * 2)
    slow.seconds[:, 0] = 1
    for objective, loss in ((Objective(max_error=10), 0.0), (Objective(min_psnr=1), 1e9)):
        choice = objective.choose(slow, loss)
        assert choice.pick.eq(0).all() and choice.speedup == 1 and choice.density == 1
    with pytest.raises(ValueError, match=r"out of reach on this device.*1\.00x"):
        Objective(target_speedup=1.1).choose(slow, 0.0)


def test_max_error_bounds_the_weighted_error():
    task, previous = _problem(units=6), float("inf")
    for limit in (0.05, 0.2, 0.5, 1.0):
        choice = Objective(max_error=limit).choose(task, 0.0)
        error = task.error.gather(1, choice.pick[:, None])[:, 0]
        weighted = (error * task.importance).sum() / task.importance.sum()
        assert choice.error == pytest.approx(weighted.sqrt().item())
        assert choice.error <= limit and choice.seconds <= previous
        previous = choice.seconds


def test_runner_up_is_the_best_of_the_others_that_cost_no_more():
    task = _problem(units=6)
    choice = at_price(task, 0.7)
    for unit, second in enumerate(runner_up(task, choice).tolist()):
        pick = choice.pick[unit]
        others = [
            (task.loss[unit, c].item(), c)
            for c in range(4)
            if c != pick and task.seconds[unit, c] <= task.seconds[unit, pick] * 1.0001
        ]
        assert second == (min(others)[1] if others else -1)


def test_random_choice_hits_the_density_and_follows_the_seed():
    task = _problem(units=60)
    for target in (0.3, 0.5, 0.7):
        choice = random_choice(task, target, seed=1)
        assert choice.density == pytest.approx(target, abs=0.003)
        assert choice.pick.equal(random_choice(task, target, seed=1).pick)
        assert not choice.pick.equal(random_choice(task, target, seed=2).pick)


@pytest.mark.parametrize(
    "sigmas", [[1.0], [0.999, 0.5, 0.1], [1.0, 0.97, 0.9, 0.7, 0.2], [0.4, 0.0]]
)
def test_stages_cover_all_noise_levels_once(sigmas):
    stages = stages_of(sigmas)
    assert len(stages) == len(sigmas)
    assert stages[0].progress_max == 1 and stages[-1].progress_min == 0
    for number in range(1001):
        assert sum(stage.covers(number / 1000, "any") for stage in stages) == 1
    for stage, sigma in zip(stages, sigmas, strict=True):
        assert stage.covers(sigma, "any")


def _table():
    points = ((0.1, 1.0), (0.3, 2.0), (0.6, 5.0))
    return CostTable(LAYOUT, 6.0, {False: points, True: points}, "auto", 1, "cpu", "float32")


COSTS = {(2, 8): _table()}


def test_seconds_are_interpolated():
    table, sparse = _table(), Pattern(Window(0), far=True)
    assert table.seconds(PATTERNS[0], 1.0) == 6
    assert table.seconds(sparse, 0.2) == pytest.approx(1.5)
    assert table.seconds(sparse, 0.01) == 1.0  # no faster than measured
    assert table.seconds(sparse, 0.9) == pytest.approx(7.5)  # in proportion
    values = [table.seconds(sparse, d / 100) for d in range(1, 101)]
    assert values == sorted(values)


def test_a_disturbed_measurement_does_not_make_sparser_slower():
    assert rising([(0.3, 2.0), (0.1, 9.0), (0.6, 1.5), (0.9, 4.0)]) == (
        (0.1, 1.5),
        (0.3, 1.5),
        (0.6, 1.5),
        (0.9, 4.0),
    )


@pytest.mark.parametrize("grid", [(4, 8, 8), (1, 1, 9), (2, 2, 2)], ids=str)
def test_cost_is_measured_at_any_size_and_the_break_even_is_not_above_it(grid):
    layout = TokenLayout.video(*grid, text_before=3)
    table = measure_cost(layout, 2, 8)
    for points in table.sparse.values():
        assert list(points) == sorted(points) and all(s > 0 for _, s in points)
    assert table.dense > 0
    assert break_even_tokens(table, 0.2, 2, 8) <= layout.seq_len


def test_a_stage_without_a_step_takes_the_larger_neighbour():
    assert filled([None, 1.0, None, 3.0, None]) == [1.0, 1.0, 3.0, 3.0, 3.0]
    with pytest.raises(ValueError, match="no step"):
        filled([None, None])


def _profile(layers=("blocks.0.attn1", "blocks.1.attn1"), heads=2, sigmas=(0.9, 0.3), zero=False):
    """A profile of random heads, made without a pipeline."""
    profile = ComponentProfile(
        "Model", "0" * 64, dict.fromkeys(layers, (heads, 8)), LAYOUT, list(sigmas), list(layers)
    )
    generator = torch.Generator().manual_seed(0)
    for level, layer in itertools.product(range(len(sigmas)), layers):
        found = profile.found[level, layer] = empty_statistics(LAYOUT, tilings(LAYOUT), heads)
        for head in range(heads):
            q, k, v = (2 * torch.randn(LAYOUT.seq_len, 8, generator=generator) for _ in range(3))
            rows = sample_rows(LAYOUT, 32, generator)
            for tile, statistics in found.items():
                one, table = (q[None], k[None], v[None]), cell_table(LAYOUT, tile)
                sums = cell_sums(*one, rows, table, 0.3, LAYOUT.seq_len)
                discover(statistics, range(head, head + 1), sums, LAYOUT, tile)
        count = len(profile.candidates(level, layer)[0])
        error = torch.rand(heads, count, generator=generator)
        error[:, 0] = 0
        profile.scores[level, layer] = {
            "error": error * (not zero),
            "error_squared": error,
            "recall": error,
            "norm": torch.rand(heads, generator=generator) * (not zero),
            "rows": torch.full((heads,), 32.0),
        }
    return profile


def test_the_problem_weighs_heads_by_their_output_and_stages_by_their_calls():
    profile = _profile()
    matters = Sensitivity([2.0, 0.5], [0.75, 0.25])
    task = problem(profile, stages_of(profile.sigmas), matters, COSTS, [6, 2], 500.0)
    assert task.weight.sum() == pytest.approx(1)
    assert task.weight[0] == pytest.approx(6 / 8 / 4)
    assert task.importance.sum() == pytest.approx(2.5)  # each stage's sensitivity, shared out
    first = [layer == profile.layers[0] for _, layer, _ in task.units]
    assert task.importance[torch.tensor(first)].sum() == pytest.approx(0.75 * 2.5)
    assert task.dense_seconds == pytest.approx(500)
    for unit, (stage, layer, head) in enumerate(task.units):
        patterns = profile.candidates(stage, layer)[head]
        assert task.candidates[unit] is patterns
        expected = [density(p, LAYOUT) for p in patterns]
        assert task.density[unit].tolist() == pytest.approx(expected)
        relative = profile.relative_error(stage, layer)[head].double()
        assert task.error[unit].equal(relative)
        assert task.seconds[unit, 0] == 6.0 * (6, 2)[stage]


def test_a_dense_head_costs_what_runs_it():
    table = dataclasses.replace(_table(), dense_head=4.0)
    profile = _profile()
    task = problem(profile, stages_of(profile.sigmas), MATTERS, {(2, 8): table}, [6, 2], 500.0)
    dense = torch.zeros(len(task.units), dtype=torch.int64)
    assert evaluate(task, dense).seconds == pytest.approx(500)  # stock attention in every layer
    one = dense.clone()
    one[0] = 1
    beside = (task.layer_of == task.layer_of[0]).sum().item() - 1
    saved = 6 * 6 - task.seconds[0, 1].item() + beside * (6 - 4) * 6
    assert evaluate(task, one).seconds == pytest.approx(500 - saved)


def test_heads_that_give_zero_make_no_nan():
    profile = _profile(zero=True)
    task = problem(profile, stages_of(profile.sigmas), MATTERS, COSTS, [1, 1], 100.0)
    choice = Objective(max_error=0.1).choose(task, 0.0)
    assert choice.error == 0 and choice.seconds < task.dense_seconds


def test_uniform_pattern_hits_the_density_from_below():
    profile = _profile()
    for target in (0.2, 0.4, 0.7):
        got = density(uniform_pattern(profile, target), LAYOUT)
        assert target - 0.05 <= got <= target
    assert uniform_pattern(profile, 0.0).shape.offsets  # its own tile at least


@pytest.mark.parametrize(
    "dial",
    [
        {},
        {"max_error": 0.1, "min_psnr": 30.0},
        {"max_error": 0},
        {"max_error": -1.0},
        {"max_error": True},
        {"max_error": float("nan")},
        {"min_psnr": float("inf")},
        {"min_psnr": "30"},
        {"target_speedup": 1.0},
        {"target_speedup": 0.5},
    ],
    ids=str,
)
def test_a_wrong_dial_is_refused(dial):
    with pytest.raises(ValueError, match=r"^(give one of|\w+ must be a finite number above)") as e:
        Objective(**dial)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("speedup", [1.1, 1.5, 2.0, 3.0])
def test_a_chosen_speedup_is_kept_with_no_more_loss_than_on_the_hull(speedup):
    task = _problem(units=24, seed=3)
    hull = least_loss(task, speedup)
    if hull is None:
        pytest.skip("out of reach")
    choice = Objective(target_speedup=speedup).choose(task, 0.0)
    assert choice.speedup >= speedup * (1 - 1e-9) and choice.loss <= hull.loss


def test_a_chosen_error_is_kept_and_no_slower_than_on_the_hull():
    task = _problem(units=24, seed=4)
    for limit in (0.1, 0.3, 0.6):
        hull = cheapest(task, lambda choice, limit=limit: choice.error <= limit)
        choice = Objective(max_error=limit).choose(task, 0.0)
        assert choice.error <= limit * (1 + 1e-9) and choice.seconds <= hull.seconds
