"""Heads that keep one pattern over noise levels: what is merged, at what loss, and heads with own lists."""

import dataclasses
import itertools
import math

import pytest
import torch

from sparse_dit.plan import Stage
from sparse_dit.search.head_runs import runner_up_of_runs, touching
from sparse_dit.search.local import improve
from sparse_dit.search.objective import Objective
from sparse_dit.search.solve import at_price, evaluate, least_damage
from sparse_dit.search.stages import merge_stages
from tests.solver_cases import random_problem


def _solved(task, speedup):
    start = least_damage(task, speedup)
    return improve(task, start, seconds=task.dense_seconds / speedup)


def _heads(task, choice):
    """For each head its patterns, stage by stage."""
    heads = {}
    for (_, *head), patterns, pick in zip(
        task.units, task.candidates, choice.pick.tolist(), strict=True
    ):
        heads.setdefault(tuple(head), []).append(patterns[pick])
    return list(heads.values())


def _runs(task, choice):
    """How long each head keeps a pattern."""
    return [[len(list(g)) for _, g in itertools.groupby(row)] for row in _heads(task, choice)]


def _count(task, choice):
    return sum(map(len, _runs(task, choice)))


def _alike(task, groups, noise=0.0):
    """Each stage's numbers become those of the first in its group, plus noise; order of lists too."""
    stage = torch.tensor([unit[0] for unit in task.units])
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        for other in group[1:]:
            for name in ("error", "seconds", "density", "importance"):
                values = getattr(task, name)
                values[stage == other] = values[stage == group[0]]
    drawn = torch.rand(task.error.shape, generator=generator, dtype=torch.float64)
    task.error.mul_(1 + noise * drawn)
    return task


def _own_stencils(seed=0):
    """Five candidates that a head has at all noise levels, and three of each level's own."""
    return _alike(random_problem(4, 2, 3, 8, seed=seed, own=3), [(0, 1), (2, 3)], noise=0.3)


def test_equal_levels_are_merged_for_little():
    task = _alike(random_problem(5, 2, 3, 8, seed=1), [(0, 1), (2, 3, 4)])
    choice = _solved(task, 1.4)
    assert _count(task, choice) > 12  # the limit cuts between equal levels
    found = merge_stages(task, choice, loss=0.1)
    assert all(run in ([2, 3], [5]) for run in _runs(task, found))
    assert found.seconds <= choice.seconds and found.damage <= choice.damage * 1.1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("loss", [0.0, 0.02, 0.5, 1e9])
def test_the_limits_are_kept_and_more_loss_merges_more(seed, loss):
    task = _own_stencils(seed)
    choice = _solved(task, 1.4)
    found = merge_stages(task, choice, loss=loss)
    assert found.damage <= choice.damage * (1 + loss) + 1e-15
    assert found.seconds <= choice.seconds * (1 + 1e-9)
    assert found.damage == pytest.approx(evaluate(task, found.pick).damage)
    assert _count(task, found) <= _count(task, merge_stages(task, choice, loss=0.0))
    if loss == 1e9:
        assert all(len(run) <= 2 for run in _runs(task, found))  # layers that are dense cut some


def test_patterns_are_merged_not_numbers():
    """The same patterns in another order at each stage, so equal numbers mean other patterns."""
    task = _alike(random_problem(2, 2, 2, 6, seed=2), [(0, 1)])
    generator = torch.Generator().manual_seed(1)
    for unit in range(4, 8):
        order = torch.cat(
            [torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(5, generator=generator)]
        )
        for values in (task.error, task.seconds, task.density):
            values[unit] = values[unit][order]
        task.candidates[unit] = [task.candidates[unit][k] for k in order.tolist()]
    found = merge_stages(task, _solved(task, 1.3), loss=0.5)
    assert _runs(task, found) == [[2]] * 4
    assert not found.pick[:4].equal(found.pick[4:])


def test_what_one_level_lacks_is_not_shared():
    task = random_problem(2, 1, 2, 6, seed=3, own=4)  # two of six candidates are in all lists
    task.seconds[:, 1], task.error[:, 1] = 0.01, 2.0  # the one shared with dense is fast, but bad
    choice = evaluate(task, task.seconds[:, 2:].argmin(1) + 2)
    assert merge_stages(task, choice, loss=0.0).pick.ge(2).any()
    found = merge_stages(task, choice, loss=1e9)
    assert _runs(task, found) == [[2]] * 2 and found.pick.lt(2).all()
    lonely = random_problem(2, 1, 2, 6, seed=3, own=5)  # only dense is
    fast = at_price(lonely, 0.0)
    assert merge_stages(lonely, fast, loss=1e9).pick.equal(fast.pick)


def test_what_stages_touch():
    task = random_problem(4)
    assert touching(task) == [[0, 1, 2, 3]]
    two = dataclasses.replace(task, components=("a", "a", "b", "b"))
    assert touching(two) == [[0, 1], [2, 3]]
    gap = (Stage(1.0, 0.6), Stage(0.5, 0.2), Stage(0.2, 0.1), Stage(0.1, 0.0, "cond"))
    assert touching(dataclasses.replace(task, stages=gap)) == [[0], [1, 2], [3]]


def test_dense_layers_stay_dense_and_no_others_become_it():
    task = _own_stencils(1)
    task.importance[:6] = 1e3  # the first stage is dense as a whole
    choice = _solved(task, 1.3)
    assert choice.pick[:6].eq(0).all() and choice.pick[6:].gt(0).any()
    found = merge_stages(task, choice, loss=0.5)
    for layer in range(8):
        mine = task.layer_of == layer
        assert found.pick[mine].any() == choice.pick[mine].any()


def test_all_dense_stays_dense():
    task = random_problem(3)
    dense = evaluate(task, torch.zeros(len(task.units), dtype=torch.int64))
    assert merge_stages(task, dense, loss=0.1).pick.eq(0).all()


@pytest.mark.parametrize("loss", [-0.1, float("nan"), float("inf")])
def test_a_loss_out_of_range_is_refused(loss):
    task = random_problem()
    with pytest.raises(ValueError, match="loss must be a finite number >= 0, got"):
        merge_stages(task, at_price(task, 1.0), loss=loss)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("dial", [{"target_speedup": 1.4}, {"max_error": 0.1}, {"min_psnr": 30.0}])
def test_what_was_asked_for_holds_when_stages_are_merged(dial, loss, seed):
    task, limit = _own_stencils(seed), 1e-4
    plain = Objective(**dial).choose(task, limit)
    found = Objective(**dial).choose(task, limit, loss)
    assert _count(task, found) <= _count(task, plain) or loss < 2
    if "target_speedup" in dial:
        assert found.speedup >= 1.4 * (1 - 1e-9)
        assert found.damage <= plain.damage * (1 + loss) + 1e-15
    if "max_error" in dial:
        assert found.error <= 0.1 * (1 + 1e-9)
    if "min_psnr" in dial:
        assert found.damage <= limit * (1 + 1e-9)


def test_what_merges_nothing_costs_nothing():
    """The loss that was put aside is given back."""
    task = random_problem(2, 1, 2, 6, seed=3, own=5)
    plain = Objective(max_error=0.1).choose(task, math.inf)
    assert Objective(max_error=0.1).choose(task, math.inf, 0.5).pick.equal(plain.pick)


def test_a_run_has_one_runner_up_that_is_no_slower():
    task = _own_stencils()
    choice = merge_stages(task, _solved(task, 1.4), loss=1.0)
    second = runner_up_of_runs(task, choice)
    assert second.ge(0).any()
    start = {}
    units = {unit: number for number, unit in enumerate(task.units)}
    for (_, layer, head), runs in zip(task.units[:6], _runs(task, choice), strict=True):
        for length in runs:
            first = start.get((layer, head), 0)
            start[layer, head] = first + length
            mine = torch.tensor([units[n, layer, head] for n in range(first, first + length)])
            patterns = {task.candidates[u][second[u]] for u in mine.tolist() if second[u] >= 0}
            assert len(patterns) <= 1
            if patterns:
                assert not patterns & {task.candidates[u][choice.pick[u]] for u in mine.tolist()}
                other, own = (
                    task.seconds[mine].gather(1, picks[mine][:, None]).sum()
                    for picks in (second, choice.pick)
                )
                assert other <= own * 1.001
