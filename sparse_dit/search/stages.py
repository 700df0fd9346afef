"""Heads that keep one pattern over neighbouring noise levels: fewer patterns for (almost) no damage.

Every pattern of a plan has an index, which is built once and kept, and a place in the file. So runs of levels
at which a head has one pattern get a price, as high as the damage allows. Levels at which every head goes on
as before are one stage: `plan.merged` writes them so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .head_runs import Run, first_places, levels_of_heads, numbered
from .local import improve, price_at
from .solve import Choice, Problem, evaluate

_ROUNDS = 24  # bisections of the price of damage
_DECADES = 2.0  # around its price in the first choice
_RUN_ROUNDS = 8  # bisections of the price of a run
_RUN_PRICES = (-6.0, 0.0)  # log10, in dense generations
_OUT_OF_REACH = 1e6  # dense generations that a candidate takes which isn't there


def merge_stages(problem: Problem, choice: Choice, *, loss: float) -> Choice:
    """A choice of fewer patterns: heads keep one over neighbouring levels where that costs least.

    All heads are chosen anew, within the same seconds. Layers that are dense as a whole stay so.

    Args:
        problem: What to choose from.
        choice: Where to start.
        loss: By how much more damage than that of `choice` is accepted, relative to it.

    Returns:
        A choice that takes no more seconds than `choice`; `choice` itself if none has fewer patterns.

    Raises:
        ValueError: If the loss is no finite number >= 0.
    """
    if not (math.isfinite(loss) and loss >= 0):
        raise ValueError(f"loss must be a finite number >= 0, got {loss!r}")
    merger = _Merger(problem, choice)
    best = choice
    low, high = _RUN_PRICES
    for _ in range(_RUN_ROUNDS):
        middle = (low + high) / 2
        found = merger.chosen(problem.dense_seconds * 10**middle)
        if found is None or found.damage > choice.damage * (1 + loss):
            high = middle
            continue
        low = middle
        best = min(best, found, key=merger.size)
    return best


class _Merger:
    """What stays the same while the prices change."""

    def __init__(self, problem: Problem, choice: Choice) -> None:
        self.problem, self.limit = problem, choice.seconds * (1 + 1e-9)
        self.price = price_at(problem, seconds=choice.seconds)
        self.numbers = numbered(problem.candidates)
        self.heads = levels_of_heads(problem, self.numbers)
        self.seconds = _fixed_layers(problem, choice)
        for seconds, numbers in zip(self.seconds, self.numbers, strict=True):
            again = torch.ones(len(numbers), dtype=torch.bool)
            again[list(first_places(numbers).values())] = False
            seconds[again] = torch.inf  # so that a pattern has one place

    def size(self, choice: Choice) -> tuple[int, int]:
        """How many distinct patterns a choice has, and how many runs."""
        picks = enumerate(choice.pick.tolist())
        runs = sum(len(part.runs(choice.pick, self.numbers)) for part in self.heads)
        return len({self.numbers[unit][place] for unit, place in picks}), runs

    def chosen(self, price: float) -> Choice | None:
        """The choice of least damage in the time, at a price for each run; None if there is none."""
        low, high, best = -_DECADES, _DECADES, None
        for _ in range(_ROUNDS):
            middle = (low + high) / 2
            value = self.seconds + self.price * 10**middle * self.problem.damage
            pick = torch.zeros(len(value), dtype=torch.int64)
            for part in self.heads:
                pick[part.units] = part.pick(value, price)
            found = evaluate(self.problem, pick)
            if found.seconds <= self.limit:
                best, low = found, middle
            else:
                high = middle
        return None if best is None else self._polished(best)

    def _polished(self, choice: Choice) -> Choice:
        """What local search makes of a choice whose runs stay as they are."""
        runs = [run for part in self.heads for run in part.runs(choice.pick, self.numbers)]
        small = self._of_runs(runs)
        start = [run.places[0].tolist().index(int(choice.pick[run.units[0]])) for run in runs]
        first = evaluate(small, torch.tensor(start))
        if first.seconds > self.limit:
            return choice
        pick = choice.pick.clone()
        for run, number in zip(
            runs, improve(small, first, seconds=self.limit).pick.tolist(), strict=True
        ):
            pick[run.units] = run.places[:, number]
        found = evaluate(self.problem, pick)
        return found if found.damage < choice.damage and found.seconds <= self.limit else choice

    def _of_runs(self, runs: Sequence[Run]) -> Problem:
        """The problem whose units are runs; as layers are fixed, each is a layer of its own."""
        missing = _OUT_OF_REACH * self.problem.dense_seconds
        longest = max(run.places.shape[1] for run in runs)

        def totals(values: Tensor, lacking: float) -> Tensor:
            parts = [run.total(values) for run in runs]
            return torch.stack([pad(x, (0, longest - len(x)), value=lacking) for x in parts])

        seconds = totals(self.seconds.clamp_max(missing), missing)
        damage = totals(self.problem.damage, 0.0)
        ones, none = torch.ones(len(runs), dtype=torch.float64), torch.zeros_like(damage)
        return Problem(
            [(number, "", 0) for number in range(len(runs))],
            [],
            importance=ones,
            seconds=seconds,
            stock_seconds=seconds[:, 0],
            error=damage,
            density=none,
            recall=none,
            weight=ones,
            stages=self.problem.stages,
            other_seconds=self.problem.other_seconds,
        )


def _fixed_layers(problem: Problem, choice: Choice) -> Tensor:
    """Seconds `[U, K]` at which layers that are dense as a whole stay so, and no others become it.

    Of each other layer the head that is fastest in the choice can't be dense: prices then don't depend on
    other heads.
    """
    seconds, layer = problem.seconds.clone(), problem.layer_of
    taken = seconds.gather(1, choice.pick[:, None])[:, 0].masked_fill(choice.pick == 0, torch.inf)
    least = taken.new_full((int(layer.max()) + 1,), torch.inf)
    least = least.scatter_reduce(0, layer, taken, "amin")[layer]
    stock = least.isinf()
    seconds[stock] = torch.inf
    seconds[stock, 0] = problem.stock_seconds[stock]
    seconds[~stock & (taken == least), 0] = torch.inf
    return seconds
