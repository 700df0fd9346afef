"""Stages that may share one choice: what is merged, at what loss, and heads with lists of their own."""

import dataclasses
import itertools

import pytest
import torch

from sparse_dit.plan import Stage
from sparse_dit.search.local import improve
from sparse_dit.search.solve import at_price, evaluate, least_damage
from sparse_dit.search.stages import merge_stages
from tests.solver_cases import random_problem


def _solved(task, speedup):
    start = least_damage(task, speedup)
    return improve(task, start, seconds=task.dense_seconds / speedup)


def _patterns(task, choice):
    """For each stage the patterns of all its heads."""
    stages = [[] for _ in task.stages]
    for (stage, _, _), patterns, pick in zip(
        task.units, task.candidates, choice.pick.tolist(), strict=True
    ):
        stages[stage].append(patterns[pick])
    return stages


def _runs(task, choice):
    return [len(list(group)) for _, group in itertools.groupby(_patterns(task, choice))]


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


def test_equal_stages_are_merged_without_loss():
    task = _alike(random_problem(5, 2, 3, 8, seed=1), [(0, 1), (2, 3, 4)])
    choice = _solved(task, 1.4)
    assert len(_runs(task, choice)) > 2  # the limit cuts between equal heads
    found = merge_stages(task, choice, loss=0.05)
    assert _runs(task, found) in ([2, 3], [5])
    assert found.seconds <= choice.seconds and found.damage <= choice.damage * 1.05


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("loss", [0.0, 0.02, 0.5, 1e9])
def test_the_loss_is_kept_and_more_of_it_merges_more(seed, loss):
    task = _alike(random_problem(4, 2, 3, 8, seed=seed), [(0, 1), (2, 3)], noise=0.3)
    choice = _solved(task, 1.4)
    found = merge_stages(task, choice, loss=loss)
    assert found.damage <= choice.damage * (1 + loss) + 1e-15
    assert found.seconds <= choice.seconds * (1 + 1e-9)
    assert found.damage == pytest.approx(evaluate(task, found.pick).damage)
    strict = merge_stages(task, choice, loss=0.0)
    assert len(_runs(task, found)) <= len(_runs(task, strict))
    if loss == 1e9:
        assert len(_runs(task, found)) == 1


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
    found = merge_stages(task, _solved(task, 1.3), loss=0.2)
    assert _runs(task, found) == [2]
    assert not found.pick[:4].equal(found.pick[4:])


def test_what_one_stage_lacks_is_not_shared():
    task = random_problem(2, 1, 2, 6, seed=3, own=4)  # two of six candidates are in all lists
    task.seconds[:, 1], task.error[:, 1] = 0.01, 2.0  # the one shared with dense is fast, but bad
    choice = evaluate(task, task.seconds[:, 2:].argmin(1) + 2)
    assert merge_stages(task, choice, loss=0.0).pick.ge(2).any()
    found = merge_stages(task, choice, loss=1e9)
    assert _runs(task, found) == [2] and found.pick.lt(2).all()
    lonely = random_problem(2, 1, 2, 6, seed=3, own=5)  # only dense is
    fast = at_price(lonely, 0.0)
    assert merge_stages(lonely, fast, loss=1e9).pick.equal(fast.pick)


def test_stages_of_other_branches_or_with_a_gap_are_not_merged():
    task = _alike(random_problem(2, 2, 2, 6), [(0, 1)])
    choice = _solved(task, 1.3)
    for stages in (
        (Stage(1.0, 0.5, "cond"), Stage(0.5, 0.0, "uncond")),
        (Stage(1.0, 0.6), Stage(0.5, 0.0)),
    ):
        other = dataclasses.replace(task, stages=stages)
        assert merge_stages(other, choice, loss=1e9) is choice
    assert _runs(task, merge_stages(task, choice, loss=1e9)) == [2]


def test_all_dense_is_one_stage_and_stays_dense():
    task = random_problem(3)
    dense = evaluate(task, torch.zeros(len(task.units), dtype=torch.int64))
    assert merge_stages(task, dense).pick.eq(0).all()


@pytest.mark.parametrize("loss", [-0.1, float("nan")])
def test_a_negative_loss_is_refused(loss):
    task = random_problem()
    with pytest.raises(ValueError, match="loss must be a number >= 0, got"):
        merge_stages(task, at_price(task, 1.0), loss=loss)
