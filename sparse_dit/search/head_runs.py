"""Each head's noise levels cut into runs of one pattern, at a price for each run.

Patterns are compared, not candidates' numbers: each head has candidates of its own at each noise level, and
what two levels don't both have, they can't share. `shared` gives them stencils in common.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..patterns import Pattern
from .nested import Candidates
from .solve import Choice, Problem

Numbers = Sequence[Sequence[int]]  # of each unit's patterns, see `numbered`


@dataclass(frozen=True, eq=False)
class Run:
    """R neighbouring levels of a head, at which it has one pattern.

    Args:
        units: int64 `[R]`.
        places: int64 `[R, k]`, for each unit the candidates' numbers of the k patterns that all have.
    """

    units: Tensor
    places: Tensor

    def total(self, values: Tensor) -> Tensor:
        """Sum over the levels `[k]` of what each candidate has, `[U, K]`."""
        return values[self.units[:, None], self.places].sum(0)


@dataclass(frozen=True, eq=False)
class HeadLevels:
    """H heads over L stages that touch.

    Args:
        units: int64 `[H, L]`.
        places: int64 `[H, L, J]`, the candidates' numbers of the patterns that several stages of a head have,
            dense first; -1 where a stage hasn't.
    """

    units: Tensor
    places: Tensor

    @staticmethod
    def of(units: Tensor, numbers: Numbers) -> HeadLevels:
        """From the numbers of all units' patterns."""
        heads = []
        for members in units.tolist():
            known = [first_places(numbers[unit]) for unit in members]
            times: dict[int, int] = {}
            for number in itertools.chain(*known):
                times[number] = times.get(number, 0) + 1
            dense, *others = times
            several = [dense, *(number for number in others if times[number] > 1)]
            heads.append(torch.tensor([[part.get(n, -1) for n in several] for part in known]))
        longest = max(part.shape[1] for part in heads)
        heads = [pad(part, (0, longest - part.shape[1]), value=-1) for part in heads]
        return HeadLevels(units, torch.stack(heads))

    def runs(self, pick: Tensor, numbers: Numbers) -> list[Run]:
        """The runs of a choice."""
        result = []
        for units, places in zip(self.units, self.places, strict=True):
            taken = [numbers[unit][pick[unit]] for unit in units.tolist()]
            cuts = [n for n in range(1, len(taken)) if taken[n] != taken[n - 1]]
            for start, end in itertools.pairwise([0, *cuts, len(taken)]):
                common = places[start:end]
                common = common[:, (common >= 0).all(0)]
                if end == start + 1:
                    common = torch.arange(len(numbers[units[start]]))[None]
                result.append(Run(units[start:end], common))
        return result

    def pick(self, value: Tensor, price: float) -> Tensor:
        """Candidates `[H, L]` of least value, with `price` for each run whose pattern isn't dense.

        Args:
            value: `[U, K]` of all candidates of the problem.
            price: Of a run.
        """
        own = value[self.units]  # [H, L, K]
        common = own.gather(2, self.places.clamp_min(0)).masked_fill(self.places < 0, torch.inf)
        heads, levels = self.units.shape
        least = [value.new_zeros(heads)]  # of the first n levels
        picks = [self.units[:, :0]]  # and the candidates that give it
        for end in range(1, levels + 1):
            cost, chosen = _least(own[:, end - 1], price)
            best, pick = least[-1] + cost, torch.cat([picks[-1], chosen[:, None]], 1)
            total = common[:, end - 1]
            for start in range(end - 2, -1, -1):
                total = total + common[:, start]
                cost, chosen = _least(total, price)
                cost += least[start]
                run = self.places[:, start:end]
                run = run.gather(2, chosen[:, None, None].expand(-1, end - start, 1))[..., 0]
                other = torch.cat([picks[start], run], 1)
                pick = torch.where((cost < best)[:, None], other, pick)
                best = torch.minimum(best, cost)
            least.append(best)
            picks.append(pick)
        return picks[-1]


def _least(value: Tensor, price: float) -> tuple[Tensor, Tensor]:
    """The least of `[H, K]` and where; all but the first, dense one cost `price` more."""
    value = value + price
    value[:, 0] -= price
    return value.min(1)


def levels_of_heads(problem: Problem, numbers: Numbers) -> list[HeadLevels]:
    """All units of a problem, by stages that touch."""
    unit = {name: number for number, name in enumerate(problem.units)}
    result = []
    for run in touching(problem):
        heads = [(layer, head) for stage, layer, head in problem.units if stage == run[0]]
        rows = [[unit[stage, layer, head] for stage in run] for layer, head in heads]
        result.append(HeadLevels.of(torch.tensor(rows), numbers))
    return result


def touching(problem: Problem) -> list[list[int]]:
    """Runs of stages that touch: of one transformer and branch, each beginning where the one before ends."""
    runs = [[0]]
    for number in range(1, len(problem.stages)):
        above, below = problem.stages[number - 1 : number + 1]
        alike = len(set(problem.components[number - 1 : number + 1])) < 2
        if alike and (above.sigma_min, above.branch) == (below.sigma_max, below.branch):
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def runner_up_of_runs(problem: Problem, choice: Choice) -> Tensor:
    """As `solve.runner_up`, but one for all levels of a run."""
    numbers = numbered(problem.candidates)
    result = torch.full_like(choice.pick, -1)
    for part in levels_of_heads(problem, numbers):
        for run in part.runs(choice.pick, numbers):
            seconds, damage = run.total(problem.seconds), run.total(problem.damage)
            known = numbers[run.units[0]]
            listed = torch.tensor([known[place] for place in run.places[0].tolist()])
            mine = listed == known[choice.pick[run.units[0]]]
            damage[mine | (seconds > seconds[mine].min() * 1.0001)] = torch.inf
            if not damage.isinf().all():
                result[run.units] = run.places[:, damage.argmin()]
    return result


def numbered(candidates: Sequence[Sequence[Pattern]]) -> list[list[int]]:
    """For each unit the numbers of its candidates' patterns: those that units share have one number."""
    numbers: dict[Hashable, int] = {}
    return [
        [
            numbers.setdefault(name, len(numbers))
            for name in (patterns.names() if isinstance(patterns, Candidates) else patterns)
        ]
        for patterns in candidates
    ]


def first_places(numbers: Sequence[int]) -> dict[int, int]:
    """Where each number first is."""
    result: dict[int, int] = {}
    for place, number in enumerate(numbers):
        result.setdefault(number, place)
    return result
