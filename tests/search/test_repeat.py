"""How alike the choices of repeated searches are, with costs that are timed anew."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_dit.search.cost import CostTable, smoothed
from sparse_dit.search.objective import Objective
from sparse_dit.search.profile_file import read_profile
from sparse_dit.search.repeat import repeated
from sparse_dit.search.sensitivity import Sensitivity
from sparse_dit.search.solve import joined, problem, stages_of

GOLDEN = Path(__file__).parents[1] / "golden"
NAME = "transformer"
DENSITIES = (0.02, 0.07, 0.15, 0.3, 0.5, 0.75)


@pytest.fixture(scope="module")
def part():
    """A stored profile of a whole model."""
    return read_profile(GOLDEN / "profile.safetensors").components[NAME]


def timed(part, seed, noise=0.03):
    """Costs as a device could be timed: each of them off by about `noise`."""
    generator = torch.Generator().manual_seed(seed)

    def off(seconds):
        return seconds * (1 + noise * torch.randn(1, generator=generator).item())

    points = {far: tuple((d, off(0.02 + 0.77 * d)) for d in DENSITIES) for far in (False, True)}
    table = CostTable(part.known_layout, 1.0, points, "cpu", 1, "cpu", "float32", off(0.79))
    return dict.fromkeys(part.head_sizes, table)


def smooth(costs):
    return {size: smoothed(table) for size, table in costs.items()}


def task_of(part, costs):
    stages, layers = stages_of(part.sigmas), len(part.layers)
    total = float(len(stages) * part.total_heads)
    matters = Sensitivity([4.0, 2.0, 1.0, 0.25], [1 / layers] * layers)
    task = problem(part, stages, matters, costs, [1] * len(stages), total)
    return joined({NAME: task}, {NAME: 1.0}, total)


def said(part, costs, loss):
    calls = {NAME: [1] * len(part.sigmas)}
    return repeated({NAME: part}, {NAME: costs}, calls, task_of(part, costs), loss)


def picks(part, loss, costs_of):
    """The choice with each of several timings of one device."""
    tasks = [task_of(part, costs_of(timed(part, seed))) for seed in range(4)]
    return [Objective(min_psnr=30.0).choose(task, loss).pick for task in tasks]


@pytest.mark.parametrize("share", [0.01, 0.05])
def test_searches_with_other_timings_choose_the_same(part, share):
    task = task_of(part, smooth(timed(part, 0)))
    loss = share * task.loss.max(1).values.sum().item()
    first, *others = picks(part, loss, smooth)
    assert (first > 0).any() and all(torch.equal(first, other) for other in others)
    raw, *others = picks(part, loss, dict)  # as searches were before timings were smoothed
    assert not all(torch.equal(raw, other) for other in others)
    found = said(part, smooth(timed(part, 0)), loss)
    assert found is not None and found["same"] == 1.0 and found["density"] == 0.0
    assert 0.01 < found["spread"] < 0.06


def test_costs_from_a_file_are_always_the_same(part):
    costs = {size: replace(t, source="h100") for size, t in timed(part, 0).items()}
    assert said(part, costs, 1e-3) == {"spread": 0.0, "same": 1.0, "density": 0.0}


def test_costs_that_are_no_line_say_nothing(part):
    assert said(part, timed(part, 0), 1e-3) is None
