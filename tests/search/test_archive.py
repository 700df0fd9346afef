"""The archive: its bins, that its front has nothing that is beaten, and how good its points are."""

import dataclasses

import pytest
import torch

from sparse_dit.search.archive import DENSITY_BIN, LATENCY_BIN, Archive, explore
from sparse_dit.search.exact import exact_least_loss
from sparse_dit.search.local import improve
from sparse_dit.search.solve import at_price, evaluate, least_loss
from tests.helpers.solver_cases import all_choices, random_problem


@pytest.fixture(scope="module")
def task():
    return random_problem(4, 3, 4, 12, seed=1)


@pytest.fixture(scope="module")
def archive(task):
    return explore(task)


def test_a_bin_keeps_the_better_of_two(task):
    archive = Archive(task)
    one = at_price(task, 3.0)
    worse = dataclasses.replace(one, loss=one.loss * 1.001)
    far = dataclasses.replace(one, density=one.density + DENSITY_BIN, loss=one.loss * 2)
    assert archive.add(worse) and archive.add(one)
    assert not archive.add(worse) and not archive.add(one)
    assert list(archive.elites.values()) == [one]
    assert archive.add(far) and len(archive.elites) == 2
    for change in (
        {"seconds": one.seconds + LATENCY_BIN * task.dense_seconds},
        {"error": one.error * 2},
    ):
        assert archive.cell(dataclasses.replace(one, **change)) != archive.cell(one)


def test_every_elite_is_what_it_says_and_lies_in_its_bin(task, archive):
    assert len(archive.elites) > 60
    for cell, elite in archive.elites.items():
        again = evaluate(task, elite.pick)
        assert (again.loss, again.seconds, again.density) == (
            elite.loss,
            elite.seconds,
            elite.density,
        )
        assert archive.cell(elite) == cell


def test_the_front_goes_from_dense_to_the_fastest_and_nothing_in_it_is_beaten(task, archive):
    front = archive.front()
    assert front[0].loss == 0 and front[0].density == 1
    assert front[-1].speedup == pytest.approx(at_price(task, 0.0).speedup, rel=1e-3)
    assert [c.speedup for c in front] == sorted(c.speedup for c in front)
    assert len(front) > 15
    for a in front:
        for b in front:
            if a is not b:
                assert a.loss > b.loss or a.seconds > b.seconds or a.density > b.density


def test_its_points_are_near_the_exact_front(task, archive):
    """Measured here: 0.2 % above exact on average, 0.8 % at most; the Lagrangian alone 62 %."""
    fastest = {}
    for cell, elite in archive.elites.items():
        known = fastest.get(cell[2])
        if elite.loss > 0 and (known is None or elite.loss < known.loss):
            fastest[cell[2]] = elite
    excess, alone = [], []
    for elite in fastest.values():
        speedup = elite.speedup * (1 - 1e-9)
        best = exact_least_loss(task, speedup).choice.loss
        excess.append(elite.loss / best - 1)
        alone.append(least_loss(task, speedup).loss / best - 1)
    assert sum(excess) / len(excess) < 0.01 and max(excess) < 0.05
    assert sum(alone) > 2 * sum(excess)


def test_at_a_density_it_is_no_worse_than_a_sweep_of_prices(task, archive):
    front = archive.front()
    for step in range(-20, 60, 5):
        point = at_price(task, 10 ** (step / 10))
        if point.density < 0.8:  # near dense the front leaves out what is slower than dense
            near = [c.loss for c in front if c.density <= point.density + DENSITY_BIN]
            assert min(near) <= point.loss * 1.01


def test_tiny_problems_are_covered_whole():
    small = random_problem(1, 2, 2, 4, seed=2)
    front, every = explore(small).front(), list(all_choices(small))
    for choice in front:
        better = [c for c in every if c.loss < 0.9 * choice.loss and c.seconds <= choice.seconds]
        better = [c for c in better if c.density <= choice.density]
        assert not better


def test_mutations_only_add(task):
    without, more = explore(task, mutations=0), explore(task, mutations=300)
    assert len(more.elites) > len(without.elites)
    for cell, elite in without.elites.items():
        other = more.elites[cell]
        assert other.loss * other.seconds <= elite.loss * elite.seconds


def test_a_seed_gives_the_same_archive(task, archive):
    again = explore(task)
    assert again.elites.keys() == archive.elites.keys()
    assert all(again.elites[cell].pick.equal(e.pick) for cell, e in archive.elites.items())
    assert explore(task, seed=1).elites.keys() != archive.elites.keys()


def test_what_is_known_is_kept_or_beaten(task):
    start = least_loss(task, 1.5)
    known = improve(task, start, seconds=start.seconds)
    archive = explore(task, [known], mutations=0)
    elite = archive.elites[archive.cell(known)]
    assert elite.loss * elite.seconds <= known.loss * known.seconds


def test_a_problem_without_a_sparse_candidate_has_one_point():
    small = random_problem(candidates=1)
    (only,) = explore(small, mutations=10).front()
    assert only.pick.equal(torch.zeros(8, dtype=torch.int64)) and only.speedup == 1


def test_all_heads_may_be_skipped():
    small = random_problem(seed=4)
    small.density[:, 1], small.seconds[:, 1] = 0.0, 0.01
    front = explore(small).front()
    assert front[-1].density == 0 and front[-1].pick.eq(1).all()
