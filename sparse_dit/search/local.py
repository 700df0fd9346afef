"""Local search on top of the Lagrangian: what lies between the points of the hull, and whole layers.

The Lagrangian of `solve` stops at points of the convex hull and prices a dense head always as one beside
sparse heads. Here a layer may also run stock attention as a whole, what a limit leaves over is spent,
and pairs of heads exchange loss for seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .exact import worth_trying
from .solve import Choice, Problem, evaluate

PARTITIONS = 8  # random halves without an exchange after which the search ends
MAX_STEPS = 400
_PAIRS = 8  # the most promising exchanges that are tried a step


def improve(
    problem: Problem, choice: Choice, *, seconds: float | None = None, loss: float | None = None
) -> Choice:
    """A choice with less loss within so many seconds, or a faster one within a loss.

    Never worse than its start. The same arguments give the same choice.

    Args:
        problem: The units, with what each of their candidates costs and spoils.
        choice: The choice to start from; the limit must hold for it.
        seconds: The most seconds that a generation may take.
        loss: The largest loss that the choice may have; give one of both limits.

    Raises:
        ValueError: If not one limit is given, or the start is beyond it.
    """
    if seconds is not None and loss is None:
        goal = _Goal("loss", "seconds", seconds)
    elif loss is not None and seconds is None:
        goal = _Goal("seconds", "loss", loss)
    else:
        raise ValueError("give one of seconds and loss, as the limit")
    limit = goal.limit
    if goal.spent(choice) > limit:
        raise ValueError(
            f"the choice to improve must keep {goal.limited} at most {limit:g}, "
            f"got {goal.spent(choice):g}; start from one that does"
        )
    price, found = _bisected(problem, goal)
    start = choice if found is None else min(choice, found, key=goal.rank)
    return _Search(problem, goal, price).descend(start)


def at_coupled_price(problem: Problem, price: float) -> Choice:
    """Least `seconds + price * loss`, whole layers of dense heads at stock seconds included.

    Args:
        problem: The units, with what each of their candidates costs and spoils.
        price: Seconds for a unit of loss.
    """
    return evaluate(problem, _coupled(problem, price))


@dataclass(frozen=True)
class _Goal:
    """What is made small, and what is limited."""

    wanted: str
    limited: str
    limit: float

    def spent(self, choice: Choice) -> float:
        return getattr(choice, self.limited)

    def rank(self, choice: Choice) -> tuple[float, float]:
        """Smaller is better; of equals the one that leaves more over."""
        return getattr(choice, self.wanted), getattr(choice, self.limited)


def _bisected(problem: Problem, goal: _Goal) -> tuple[float, Choice | None]:
    """The price at which the limit is just kept, with its choice; None if no price keeps it."""
    low, high, best = -12.0, 12.0, None  # log10 of seconds per loss, both relative
    unit = problem.dense_seconds / max(problem.loss.max().item(), 1e-300)
    for _ in range(40):
        middle = (low + high) / 2
        choice = at_coupled_price(problem, unit * 10**middle)
        kept = goal.spent(choice) <= goal.limit
        if kept and (best is None or goal.rank(choice) < goal.rank(best)):
            best = choice
        if kept == (goal.limited == "seconds"):
            low = middle
        else:
            high = middle
    return unit * 10 ** ((low + high) / 2), best


def _coupled(problem: Problem, price: float) -> Tensor:
    """Picks of `at_coupled_price`, int64 `[U]`."""
    sparse = _sparse_layers(problem, price)
    layer = problem.layer_of
    value = problem.seconds + price * problem.loss
    gain = value.gather(1, sparse[:, None])[:, 0]
    gain -= problem.stock_seconds + price * problem.loss[:, 0]
    total = _by_layer(problem, gain)
    return torch.where(total[layer] < 0, sparse, 0)


def _sparse_layers(problem: Problem, price: float) -> Tensor:
    """The best picks at a price if each layer must have a sparse head, int64 `[U]`."""
    value = problem.seconds + price * problem.loss
    if value.shape[1] == 1:
        return torch.zeros(len(value), dtype=torch.int64)
    best, pick = value.min(1)
    other, second = value[:, 1:].min(1)
    regret = other - best
    layer = problem.layer_of
    least = torch.full((int(layer.max()) + 1,), torch.inf, dtype=regret.dtype)
    least = least.scatter_reduce(0, layer, regret, "amin")
    forced = (regret <= least[layer]) & (least[layer] > 0)
    first = torch.full((len(least),), len(value), dtype=torch.int64)
    numbers = torch.arange(len(value))
    first = first.scatter_reduce(0, layer[forced], numbers[forced], "amin")
    return torch.where(first[layer] == numbers, second + 1, pick)


def _by_layer(problem: Problem, values: Tensor) -> Tensor:
    """Sums over the units of each layer."""
    layer = problem.layer_of
    return torch.zeros(int(layer.max()) + 1, dtype=values.dtype).index_add_(0, layer, values)


class _Search:
    """Moves of a problem: M of one unit each, then one for each target and layer."""

    def __init__(self, problem: Problem, goal: _Goal, price: float) -> None:
        self.problem, self.goal = problem, goal
        keep = worth_trying(problem)
        keep[:, 0] = True
        self.unit, self.candidate = keep.nonzero(as_tuple=True)
        dense = torch.zeros(len(problem.units), dtype=torch.int64)
        around = [_sparse_layers(problem, price * factor) for factor in (0.3, 1.0, 3.0)]
        self.targets = [dense, *around]
        self.stock = _by_layer(problem, problem.stock_seconds)
        totals = [self._layer_totals(target) for target in self.targets]
        self.target_seconds, self.target_loss = map(torch.stack, zip(*totals, strict=True))

    def descend(self, choice: Choice) -> Choice:
        """Moves and exchanges until none helps."""
        generator = torch.Generator().manual_seed(0)
        failed = 0
        for _ in range(MAX_STEPS):
            wanted, limited = self._deltas(choice)
            slack = self.goal.limit - self.goal.spent(choice)
            better = self._single(choice, wanted, limited, slack)
            if better is None:
                better = self._pair(choice, wanted, limited, slack, generator)
            failed = failed + 1 if better is None else 0
            choice = better or choice
            if failed == PARTITIONS:
                break
        return choice

    def _layer_totals(self, pick: Tensor) -> tuple[Tensor, Tensor]:
        """Seconds and loss of each layer."""
        problem = self.problem
        seconds, loss = (
            _by_layer(problem, values.gather(1, pick[:, None])[:, 0])
            for values in (problem.seconds, problem.loss)
        )
        sparse = _by_layer(problem, (pick > 0).double()) > 0
        return torch.where(sparse, seconds, self.stock), loss

    def _deltas(self, choice: Choice) -> tuple[Tensor, Tensor]:
        """What each move changes, in what is wanted and in what is limited; exact for one move."""
        problem, pick, unit = self.problem, choice.pick, self.unit
        layer = problem.layer_of
        mine = problem.seconds.gather(1, pick[:, None])[:, 0]
        others = _by_layer(problem, mine)[layer] - mine
        sparse = (pick > 0).double()
        lonely = (_by_layer(problem, sparse)[layer] - sparse) == 0  # no other head is sparse
        now_seconds, now_loss = self._layer_totals(pick)
        after = others[unit] + problem.seconds[unit, self.candidate]
        stock = lonely[unit] & (self.candidate == 0)
        after = torch.where(stock, self.stock[layer[unit]], after)
        loss = problem.loss[unit, self.candidate] - problem.loss[unit, pick[unit]]
        seconds = torch.cat(
            [after - now_seconds[layer[unit]], (self.target_seconds - now_seconds).flatten()]
        )
        loss = torch.cat([loss, (self.target_loss - now_loss).flatten()])
        return (loss, seconds) if self.goal.wanted == "loss" else (seconds, loss)

    def _single(
        self, choice: Choice, wanted: Tensor, limited: Tensor, slack: float
    ) -> Choice | None:
        """The move that gains most for what it takes of the slack; None if none gains."""
        gain = -wanted
        fits = (gain > self._tiny(choice)) & (limited <= slack)
        free = fits & (limited <= 0)
        if free.any():
            move = gain.masked_fill(~free, -torch.inf).argmax()
        elif fits.any():
            move = (gain / limited.clamp_min(1e-300)).masked_fill(~fits, -torch.inf).argmax()
        else:
            return None
        return self._tried(choice, [int(move)])

    def _pair(
        self,
        choice: Choice,
        wanted: Tensor,
        limited: Tensor,
        slack: float,
        generator: torch.Generator,
    ) -> Choice | None:
        """The best of exchanges between two random halves of the units; None if none gains."""
        half = torch.randint(2, (len(self.problem.units),), generator=generator).bool()
        layers = torch.randint(2, self.target_seconds.shape, generator=generator).bool()
        first = torch.cat([half[self.unit], layers.flatten()])
        one, two = first.nonzero()[:, 0], (~first).nonzero()[:, 0]
        if not len(one) or not len(two):
            return None
        one = one[limited[one].argsort(stable=True)]
        least, where = wanted[one].cummin(0)
        place = torch.searchsorted(limited[one], slack - limited[two], right=True) - 1
        total = torch.where(place >= 0, wanted[two] + least[place.clamp_min(0)], torch.inf)
        best = total.topk(min(_PAIRS, len(total)), largest=False)
        for value, number in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if value >= -self._tiny(choice):
                return None
            moves = [int(one[where[place[number]]]), int(two[number])]
            if (found := self._tried(choice, moves)) is not None:
                return found
        return None

    def _tried(self, choice: Choice, moves: list[int]) -> Choice | None:
        """The choice after the moves, if it is better and within the limit."""
        pick = choice.pick.clone()
        for move in moves:
            if move < len(self.unit):
                pick[self.unit[move]] = self.candidate[move]
            else:
                target, layer = divmod(move - len(self.unit), len(self.stock))
                members = self.problem.layer_of == layer
                pick[members] = self.targets[target][members]
        found = evaluate(self.problem, pick)
        good = self.goal.spent(found) <= self.goal.limit
        return found if good and self.goal.rank(found) < self.goal.rank(choice) else None

    def _tiny(self, choice: Choice) -> float:
        """Gains below this are rounding."""
        return 1e-12 * abs(getattr(choice, self.goal.wanted))
