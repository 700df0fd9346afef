"""The exact solver: against brute force, its bound, and what it says of other choices."""

import dataclasses

import pytest
import torch

from sparse_dit.search.exact import certify, exact_least_loss, worth_trying
from sparse_dit.search.solve import at_price, evaluate, least_loss
from tests.helpers.solver_cases import all_choices, random_problem

TINY = {"stages": 1, "layers": 2, "heads": 3, "candidates": 4}


@pytest.mark.parametrize("dense_head", [0.7, 1.0, 1.4])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_best_of_all_choices(seed, dense_head):
    task = random_problem(**TINY, seed=seed, dense_head=dense_head)
    every = list(all_choices(task))
    fastest = max(c.speedup for c in every)
    for share in (0.0, 0.2, 0.5, 0.8, 0.999):
        wanted = 1 + (fastest - 1) * share
        best = min(c.loss for c in every if c.speedup >= wanted)
        found = exact_least_loss(task, wanted)
        assert found.choice.speedup >= wanted
        assert found.choice.loss == pytest.approx(best, rel=1e-6, abs=1e-12)
        assert found.bound <= best * (1 + 1e-9) and found.gap <= 1e-5 and found.optimal
    assert exact_least_loss(task, fastest * 1.01) is None


@pytest.mark.parametrize("dense_head", [0.7, 1.0, 1.4])
def test_what_is_left_out_is_never_needed(dense_head):
    task = random_problem(**TINY, seed=7, dense_head=dense_head)
    keep = worth_trying(task)
    assert not keep.all()
    kept, every = [], list(all_choices(task))
    for choice in every:
        mine = keep.gather(1, choice.pick[:, None])[:, 0]
        mine |= choice.pick == 0
        kept += [choice] if mine.all() else []
    for limit in torch.linspace(min(c.seconds for c in every), task.dense_seconds, 20).tolist():

        def least(among, limit=limit + 1e-9):
            return min(c.loss for c in among if c.seconds <= limit)

        assert least(kept) == pytest.approx(least(every))


def test_a_layer_of_dense_heads_runs_stock():
    task = random_problem(1, 2, 2, 3, dense_head=5.0)
    found = exact_least_loss(task, 1.0)
    assert found.choice.pick.eq(0).all() and found.choice.loss == 0  # 5 s a head would be too slow
    free = random_problem(
        1, 1, 2, 3, dense_head=0.1
    )  # dense is cheap, but only beside a sparse head
    found = exact_least_loss(free, 1.2)
    assert found.choice.pick.ne(0).any() and found.choice.speedup >= 1.2


def test_certify_measures_how_far_a_choice_is_from_the_best():
    task = random_problem(2, 3, 4, 8, seed=3)
    start = least_loss(task, 1.4)
    best = exact_least_loss(task, start.speedup).choice
    certificate = certify(task, best)
    assert certificate.gap <= 1e-5 and certificate.optimal and certificate.choice is best
    worse = certify(task, start)
    assert worse.bound <= best.loss * (1 + 1e-9)
    assert worse.gap == pytest.approx(1 - best.loss / start.loss, abs=1e-4)
    spoiled = start.pick.clone()
    spoiled[task.loss.max(1).values.argmax()] = 1
    assert certify(task, evaluate(task, spoiled)).gap > worse.gap
    assert certify(task, evaluate(task, torch.zeros_like(start.pick))).gap == 0


def test_the_fastest_choice_can_be_certified():
    task = random_problem(2, 3, 4, 8, seed=5)
    assert 0 <= certify(task, at_price(task, 0.0)).gap < 1


def test_scale_does_not_matter():
    task = random_problem(2, 2, 4, 8, seed=1)
    tiny = dataclasses.replace(task, importance=task.importance * 1e-9)
    picks = [exact_least_loss(t, 1.5).choice for t in (task, tiny)]
    assert picks[0].loss * 1e-9 == pytest.approx(picks[1].loss, rel=1e-5)


def test_a_candidate_of_huge_loss_does_not_blur_the_others():
    """HiGHS stops at an absolute difference: next to a loss of 1e6 it would take all others as equal."""
    task = random_problem(4, 3, 4, 12, seed=1)
    task.seconds[:, 11] = 100.0  # never taken
    best = [exact_least_loss(task, wanted).choice.loss for wanted in (1.1, 1.2, 1.4)]
    task.seconds[:, 11], task.error[:, 11] = 1e-3, 1e6 / task.importance
    fresh = dataclasses.replace(task)  # loss is cached
    for wanted, least in zip((1.1, 1.2, 1.4), best, strict=True):
        found = exact_least_loss(fresh, wanted)
        assert found.choice.loss == pytest.approx(least, rel=1e-6)
        assert found.bound <= least * (1 + 1e-9)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_numbers_out_of_range_are_refused(value):
    task = random_problem()
    for wrong in ({"speedup": value}, {"speedup": 1.2, "time_limit": value}):
        with pytest.raises(ValueError, match="must be a finite number above 0, got"):
            exact_least_loss(task, **wrong)
    with pytest.raises(ValueError, match="time_limit must be"):
        certify(task, at_price(task, 1.0), time_limit=value)
