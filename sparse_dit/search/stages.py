"""Neighbouring noise levels that may share one choice: fewer stages for (almost) no damage.

Patterns are compared, not candidates' numbers: each head has candidates of its own at each noise level,
and what two of them don't both have, their stage can't have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..patterns import Pattern
from ..plan import Stage
from .local import at_coupled_price, improve, price_at
from .solve import Choice, Problem, evaluate, least_damage

_TRIES = 3  # pairs that are tried, least expected loss first, before no more are merged
_OUT_OF_REACH = 1e6  # dense generations that a candidate takes which isn't there


def merge_stages(problem: Problem, choice: Choice, *, loss: float = 0.01) -> Choice:
    """A choice in which as many neighbouring stages as possible give every head the same pattern.

    Pairs are merged from the least loss on, and all heads are chosen anew after each, within the same
    seconds. `plan.merged` then writes such stages as one.

    Args:
        problem: What to choose from.
        choice: Where to start.
        loss: By how much more damage than that of `choice` is accepted, relative to it.

    Returns:
        A choice that takes no more seconds than `choice`; `choice` itself if nothing can be merged.

    Raises:
        ValueError: If the loss is negative.
    """
    if not loss >= 0:
        raise ValueError(f"loss must be a number >= 0, got {loss!r}")
    merger = _Merger(problem, choice, choice.damage * (1 + loss))
    runs = tuple((stage,) for stage in range(len(problem.stages)))
    best = choice
    while (step := merger.step(runs)) is not None:
        runs, best = step
    return best


@dataclass(frozen=True, eq=False)
class Reduced:
    """A problem whose stages are runs of another's.

    Args:
        problem: One unit for each run, layer and head; candidates are what all its units have.
        members: For each unit the units of the other problem, int64 `[R]`, R stages in the run.
        places: For each unit the candidates' numbers there, int64 `[R, K]`; -1 for none.
    """

    problem: Problem
    members: list[Tensor]
    places: list[Tensor]

    def expanded(self, pick: Tensor, like: Tensor) -> Tensor:
        """A pick of this problem as one of the other; units that it lacks are as in `like`."""
        result = like.clone()
        for unit, number in enumerate(pick.tolist()):
            result[self.members[unit]] = self.places[unit][:, number]
        return result


class _Merger:
    """What stays the same while stages are merged one by one."""

    def __init__(self, problem: Problem, choice: Choice, damage: float) -> None:
        self.problem, self.choice, self.most = problem, choice, damage
        self.price = price_at(problem, seconds=choice.seconds)
        self.numbers = _numbered(problem.candidates)
        self.unit = {unit: number for number, unit in enumerate(problem.units)}
        self.values: dict[tuple[int, ...], float] = {}

    def step(
        self, runs: tuple[tuple[int, ...], ...]
    ) -> tuple[tuple[tuple[int, ...], ...], Choice] | None:
        """The runs with one pair merged, and their best choice; None if none is good enough."""
        pairs = [i for i in range(len(runs) - 1) if self._touch(runs[i][-1], runs[i + 1][0])]
        expected = {
            i: self._value(runs[i] + runs[i + 1]) - self._value(runs[i]) - self._value(runs[i + 1])
            for i in pairs
        }
        for i in sorted(pairs, key=expected.__getitem__)[:_TRIES]:
            joined = (*runs[:i], runs[i] + runs[i + 1], *runs[i + 2 :])
            found = self._solved(joined)
            if found is not None and found.damage <= self.most:
                return joined, found
        return None

    def _touch(self, one: int, two: int) -> bool:
        """Whether they can be one stage; those of two transformers can't, as the first ends at 0."""
        above, below = self.problem.stages[one], self.problem.stages[two]
        return above.sigma_min == below.sigma_max and above.branch == below.branch

    def _value(self, run: tuple[int, ...]) -> float:
        """Least seconds and damage, at the price, of a run of stages."""
        if run not in self.values:
            part = self.reduced([run]).problem
            best = at_coupled_price(part, self.price)
            self.values[run] = best.seconds - part.other_seconds + self.price * best.damage
        return self.values[run]

    def _solved(self, runs: Sequence[tuple[int, ...]]) -> Choice | None:
        """The choice of least damage in the time of the first choice; None if there is none."""
        reduced = self.reduced(runs)
        limit = self.choice.seconds
        start = least_damage(reduced.problem, reduced.problem.dense_seconds / limit * (1 + 1e-9))
        if start is None:
            return None
        found = improve(reduced.problem, start, seconds=limit)
        result = evaluate(self.problem, reduced.expanded(found.pick, self.choice.pick))
        return result if result.seconds <= limit * (1 + 1e-9) else None

    def reduced(self, runs: Sequence[tuple[int, ...]]) -> Reduced:
        """The problem of these runs alone."""
        problem = self.problem
        heads = [(run, unit) for run in runs for unit in problem.units if unit[0] == run[0]]
        members = [
            torch.tensor([self.unit[stage, layer, head] for stage in run])
            for run, (_, layer, head) in heads
        ]
        places = [self._shared(units) for units in members]
        count = max(part.shape[1] for part in places)
        places = [torch.nn.functional.pad(p, (0, count - p.shape[1]), value=-1) for p in places]
        order = {run: number for number, run in enumerate(runs)}
        units = [(order[run], layer, head) for run, (_, layer, head) in heads]
        stages = [(problem.stages[run[0]], problem.stages[run[-1]]) for run in runs]
        named = tuple(problem.components[run[0]] for run in runs) if problem.components else ()
        small = replace(_joined(problem, units, stages, members, places), components=named)
        return Reduced(small, members, places)

    def _shared(self, units: Tensor) -> Tensor:
        """Numbers of the candidates that all units have, dense first, int64 `[R, K]`."""
        first, *others = [self.numbers[unit] for unit in units.tolist()]
        shared = [n for n in first if all(n in other for other in others)]
        return torch.tensor([[part[n] for n in shared] for part in (first, *others)])


def _joined(
    problem: Problem,
    units: list[tuple[int, str, int]],
    stages: list[tuple[Stage, Stage]],
    members: list[Tensor],
    places: list[Tensor],
) -> Problem:
    """The problem of `Reduced`; `stages` are the first and the last one of each run."""
    columns = [_summed(problem, *pair) for pair in zip(members, places, strict=True)]
    seconds, error, density, recall = (torch.stack(part) for part in zip(*columns, strict=True))
    importance, stock, weight = (
        torch.stack([values[those].sum() for those in members])
        for values in (problem.importance, problem.stock_seconds, problem.weight)
    )
    first = [
        [problem.candidates[int(those[0])][max(0, k)] for k in part[0].tolist()]
        for those, part in zip(members, places, strict=True)
    ]
    return Problem(
        units,
        first,
        importance,
        seconds,
        stock,
        error,
        density,
        recall,
        weight,
        tuple(Stage(top.sigma_max, low.sigma_min, top.branch) for top, low in stages),
        problem.other_seconds,
    )


def _summed(
    problem: Problem, units: Tensor, places: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Seconds, error, density and recall `[K]` of candidates over the units of a run."""
    rows, known = units[:, None], places.clamp_min(0)
    missing = places[0] < 0
    share = _shares(problem.importance[units])[:, None]
    weight = _shares(problem.weight[units])[:, None]
    seconds = problem.seconds[rows, known].sum(0)
    return (
        seconds.masked_fill(missing, _OUT_OF_REACH * problem.dense_seconds),
        (problem.error[rows, known] * share).sum(0),
        (problem.density[rows, known] * weight).sum(0),
        (problem.recall[rows, known] * weight).sum(0),
    )


def _shares(values: Tensor) -> Tensor:
    """Values by their sum; equal ones if that is 0."""
    total = values.sum()
    return values / total if total > 0 else torch.full_like(values, 1 / len(values))


def _numbered(candidates: Sequence[Sequence[Pattern]]) -> list[dict[int, int]]:
    """For each unit the first candidate of each pattern, by the pattern's number."""
    numbers: dict[Pattern, int] = {}
    known: dict[int, int] = {}  # by identity: hashing a long pattern takes longer
    result = []
    for patterns in candidates:
        mine: dict[int, int] = {}
        for place, pattern in enumerate(patterns):
            if id(pattern) not in known:
                known[id(pattern)] = numbers.setdefault(pattern, len(numbers))
            mine.setdefault(known[id(pattern)], place)
        result.append(mine)
    return result
