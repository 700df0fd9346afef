"""All that a problem can give, not one answer: a MAP-Elites archive over density, error and latency.

Each bin keeps its best choice. It is filled by sweeps over the price of loss (in seconds and in
density), by local search at each latency, and by mutations of what is there. MAP-Elites: Mouret and
Clune, https://arxiv.org/abs/1504.04909.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from .exact import worth_trying
from .local import at_coupled_price, improve
from .solve import Choice, Problem, evaluate

DENSITY_BIN = 0.025
LATENCY_BIN = 0.025  # of the dense seconds
ERROR_BIN = 0.1  # decades
PRICES = 80
MUTATIONS = 400
_DECADES = (-4.0, 8.0)  # of prices, in dense generations for the largest loss of a head
_SHARE = 0.03  # of units that a mutation changes at random

Cell = tuple[int, int, int]


class Archive:
    """The best known choice of each bin.

    Args:
        problem: The problem that the choices are of.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.elites: dict[Cell, Choice] = {}
        self.fastest: Choice | None = None

    def cell(self, choice: Choice) -> Cell:
        """Bin of a choice: density, error, latency."""
        error = math.log10(max(choice.error, 1e-9))
        latency = choice.seconds / self.problem.dense_seconds
        bins = ((choice.density, DENSITY_BIN), (error, ERROR_BIN), (latency, LATENCY_BIN))
        density, error, latency = (math.floor(value / width) for value, width in bins)
        return density, error, latency

    def add(self, choice: Choice) -> bool:
        """Whether the choice became its bin's elite: the least loss times seconds.

        What takes longer than dense never does.
        """
        if choice.seconds > self.problem.dense_seconds * (1 + 1e-9):
            return False
        if self.fastest is None or choice.seconds < self.fastest.seconds:
            self.fastest = choice
        cell = self.cell(choice)
        known = self.elites.get(cell)
        if known is not None and _rank(known) <= _rank(choice):
            return False
        self.elites[cell] = choice
        return True

    def front(self) -> list[Choice]:
        """Choices that nothing else here beats, by rising speed-up.

        They are the choice of least loss in each bin of latency and in each bin of density, and the fastest
        one of all. Of these a choice is left out if another is no worse in loss, seconds and density.
        """
        best: dict[tuple[str, int], Choice] = {}
        if self.fastest is not None:
            best["fastest", 0] = self.fastest
        for (density, _, latency), choice in self.elites.items():
            for key in (("density", density), ("latency", latency)):
                if key not in best or choice.loss < best[key].loss:
                    best[key] = choice
        found = {id(choice): choice for choice in best.values()}.values()
        kept = [c for c in found if not any(_beats(other, c) for other in found)]
        return sorted(kept, key=lambda choice: (choice.speedup, -choice.loss))


def explore(
    problem: Problem,
    known: Iterable[Choice] = (),
    *,
    mutations: int = MUTATIONS,
    seed: int = 0,
) -> Archive:
    """An archive of good choices of a problem; the same arguments give the same archive.

    Args:
        problem: The units, with what each of their candidates costs and spoils.
        known: Choices that the archive begins with, beside those that it finds itself.
        mutations: How many changed choices are tried.
        seed: The seed by which choices are changed.
    """
    small, order = _without_dominated(problem)
    archive = Archive(small)
    for choice in (
        evaluate(small, torch.zeros(len(small.units), dtype=torch.int64)),
        *_swept(small),
    ):
        archive.add(choice)
    for seen in (small, _in_density(small)):
        _polish(archive, seen)
    generator = torch.Generator().manual_seed(seed)
    for number in range(mutations):
        change = _MUTATIONS[number % len(_MUTATIONS)]
        archive.add(evaluate(small, change(archive, generator)))
    result = Archive(problem)
    ends = [] if archive.fastest is None else [archive.fastest]
    for choice in (*archive.elites.values(), *ends):
        result.add(evaluate(problem, order.gather(1, choice.pick[:, None])[:, 0]))
    for choice in known:
        result.add(choice)
    return result


def _without_dominated(problem: Problem) -> tuple[Problem, Tensor]:
    """The problem without candidates that no best choice needs, and their numbers, int64 `[U, k]`."""
    keep = worth_trying(problem) | worth_trying(_in_density(problem))
    keep[:, 0] = True
    order = (~keep).to(torch.int8).argsort(dim=1, stable=True)[:, : int(keep.sum(1).max())]
    tables = ("seconds", "error", "density", "recall", "measured")
    known = {name: getattr(problem, name) for name in tables}
    columns = {name: x.gather(1, order) for name, x in known.items() if x is not None}
    listed = [
        [patterns[place] for place in places]
        for patterns, places in zip(problem.candidates, order.tolist(), strict=True)
    ]
    return replace(problem, candidates=listed, **columns), order


def _in_density(problem: Problem) -> Problem:
    """The same problem with density in the place of seconds."""
    share = problem.weight / problem.weight.sum()
    return replace(
        problem,
        seconds=problem.density * share[:, None],
        stock_seconds=problem.density[:, 0] * share,
        other_seconds=1e-3,  # not 0, as all heads may be skipped
        saved_seconds=0.0,
    )


def _swept(problem: Problem) -> Iterable[Choice]:
    """Points of the hull in seconds and in density, from fast to dense."""
    low, high = _DECADES
    for seen in (problem, _in_density(problem)):
        unit = seen.dense_seconds / max(seen.loss.max().item(), 1e-300)
        for number in range(PRICES):
            price = unit * 10 ** (low + (high - low) * number / (PRICES - 1))
            yield evaluate(problem, at_coupled_price(seen, price).pick)


def _polish(archive: Archive, seen: Problem) -> None:
    """Local search at the upper end of each bin of latency, or of density if that is what is seen."""
    elites = [evaluate(seen, elite.pick) for elite in archive.elites.values()]
    for number in range(1, math.ceil(1 / LATENCY_BIN) + 1):
        limit = number * LATENCY_BIN * seen.dense_seconds
        within = [choice for choice in elites if choice.seconds <= limit]
        if within:
            start = min(within, key=lambda choice: choice.loss)
            found = improve(seen, start, seconds=limit)
            archive.add(evaluate(archive.problem, found.pick))


def _other_units(archive: Archive, generator: torch.Generator) -> Tensor:
    """An elite in which a few units are drawn anew at random."""
    pick = _elite(archive, generator).pick.clone()
    chosen = torch.rand(len(pick), generator=generator, dtype=torch.float32) < max(
        _SHARE, 1 / len(pick)
    )
    drawn = torch.randint(archive.problem.seconds.shape[1], pick.shape, generator=generator)
    return torch.where(chosen, drawn, pick)


def _other_layers(archive: Archive, generator: torch.Generator) -> Tensor:
    """An elite that has each layer at each stage from another one, or not, at random."""
    layer = archive.problem.layer_of
    swap = torch.rand(int(layer.max()) + 1, generator=generator, dtype=torch.float32) < 0.25
    one, two = (_elite(archive, generator).pick for _ in range(2))
    return torch.where(swap[layer], two, one)


def _other_stage(archive: Archive, generator: torch.Generator) -> Tensor:
    """An elite that has one stage from another one."""
    problem = archive.problem
    stage = torch.tensor([unit[0] for unit in problem.units])
    drawn = int(torch.randint(len(problem.stages), (1,), generator=generator))
    one, two = (_elite(archive, generator).pick for _ in range(2))
    return torch.where(stage == drawn, two, one)


_Mutation = Callable[[Archive, torch.Generator], Tensor]
_MUTATIONS: tuple[_Mutation, ...] = (_other_units, _other_layers, _other_stage)


def _elite(archive: Archive, generator: torch.Generator) -> Choice:
    elites = list(archive.elites.values())
    return elites[int(torch.randint(len(elites), (1,), generator=generator))]


def _rank(choice: Choice) -> tuple[float, float]:
    return choice.loss * choice.seconds, choice.seconds


def _beats(one: Choice, two: Choice) -> bool:
    """Whether it is as good in all, and better in something."""
    a, b = ((c.loss, c.seconds, c.density) for c in (one, two))
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))
