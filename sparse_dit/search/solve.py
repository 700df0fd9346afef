"""Choose one candidate for every head at every noise level: least loss for the time, or vice versa.

A multiple-choice knapsack. With a price on loss each head chooses on its own (Lagrangian), and the
price is found by bisection; solutions lie on the convex hull of the exact front.

The transformers of a pipeline make one problem: loss is the change of the finished video, whichever of them
the error is in, and seconds are those of the whole generation.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..patterns import Pattern
from ..plan import Stage
from .cost import Costs
from .profile import ComponentProfile, bounds_of
from .seen import densities
from .sensitivity import Sensitivity


@dataclass(frozen=True, eq=False)
class Problem:
    """What each candidate of every unit costs and spoils.

    A unit is a head of a layer at a stage: one decision of a multiple-choice knapsack problem, in which each
    unit takes one of its K candidates. There are U units.

    Args:
        units: `(stage, layer, head)` of each unit.
        candidates: `[U][K]` patterns; the first is dense.
        importance: float64 `[U]`, expected mean squared change of the video for a squared relative
            error of 1 of the head.
        seconds: float64 `[U, K]`, what the unit's attention takes in a whole generation, in a layer that has
            sparse heads.
        stock_seconds: float64 `[U]`, what it takes in a layer whose heads are all dense.
        error: float64 `[U, K]`, squared relative error of the head behind the layer's output projection.
        density: float64 `[U, K]`, computed pairs over all pairs.
        recall: float64 `[U, K]`, share of the attention mass that is seen exactly.
        weight: float64 `[U]`, share of the unit in the generation's attention calls; sums to 1.
        stages: The stages of noise levels, of one transformer after the other.
        other_seconds: What a generation takes outside of attention.
        components: For each stage the name of the transformer that it is of; empty if that doesn't matter.
        measured: float64 `[U, K]`, the loss of each candidate alone, where it was measured one by one and
            isn't `error` times `importance`.
        saved_seconds: What a step cache saves of a dense generation.
        ran: float64 `[U]`, the share of each unit's calls that a step cache lets run; None without one.
    """

    units: list[tuple[int, str, int]]
    candidates: list[Sequence[Pattern]]
    importance: Tensor
    seconds: Tensor
    stock_seconds: Tensor
    error: Tensor
    density: Tensor
    recall: Tensor
    weight: Tensor
    stages: tuple[Stage, ...]
    other_seconds: float
    components: tuple[str, ...] = ()
    measured: Tensor | None = None
    saved_seconds: float = 0.0
    ran: Tensor | None = None

    @functools.cached_property
    def loss(self) -> Tensor:
        """The expected change of the output by each candidate alone, float64 `[U, K]`.

        Of a video the mean squared change of its pixels, of a language model's prediction the divergence.
        """
        return self.error * self.importance[:, None] if self.measured is None else self.measured

    @property
    def dense_seconds(self) -> float:
        """Seconds of a dense generation, without a step cache."""
        return self.other_seconds + self.stock_seconds.sum().item() + self.saved_seconds

    @functools.cached_property
    def layer_of(self) -> Tensor:
        """The number of each unit's layer, int64 `[U]`; a layer has another number at each noise level."""
        numbers: dict[tuple[int, str], int] = {}
        return torch.tensor([numbers.setdefault(unit[:2], len(numbers)) for unit in self.units])

    @functools.cached_property
    def level_of(self) -> tuple[int, ...]:
        """For each stage its number among the stages of its transformer."""
        return tuple(
            self.components[:stage].count(name) for stage, name in enumerate(self.components)
        )

    def stages_of(self, component: str) -> list[int]:
        """Numbers of a transformer's stages."""
        return [number for number, name in enumerate(self.components) if name == component]

    def units_of(self, component: str) -> Tensor:
        """Numbers of a transformer's units, int64 `[u]`."""
        mine = [self.components[stage] == component for stage, _, _ in self.units]
        return torch.tensor(mine).nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class Choice:
    """A solution: the candidate of each unit, and what it comes to.

    Args:
        pick: The number of each unit's candidate, int64 `[U]`.
        loss: The expected mean squared change of the video, before a verified run corrects it.
        seconds: What a generation takes with it.
        speedup: The seconds of a dense generation over `seconds`.
        error: Root of the importance-weighted mean of the squared relative errors of heads.
        density: The mean density over all attention calls.
    """

    pick: Tensor
    loss: float
    seconds: float
    speedup: float
    error: float
    density: float


def stages_of(sigmas: Sequence[float]) -> tuple[Stage, ...]:
    """Noise levels around each recorded sigma: bounds halfway between neighbours."""
    pairs = itertools.pairwise(bounds_of(sigmas))
    return tuple(Stage(round(high, 6), round(low, 6)) for high, low in pairs)


def problem(
    profile: ComponentProfile,
    stages: tuple[Stage, ...],
    sensitivity: Sensitivity,
    costs: Costs,
    calls: Sequence[int],
    dense_generation: float,
) -> Problem:
    """The problem of one transformer, of its profile, sensitivity and costs; see `joined` for several.

    Args:
        profile: The transformer's profile, with the scores of all heads.
        stages: One stage for each recorded noise level.
        sensitivity: How sensitive the video is to errors of each stage and layer.
        costs: What a call of one head takes, in seconds, for each kind of layer.
        calls: For each stage the forwards of a generation that fall into it, times the batch.
        dense_generation: Seconds of a whole dense generation.
    """
    units, candidates, importance, weight, stock = [], [], [], [], []
    columns: dict[str, list[Tensor]] = {"seconds": [], "error": [], "density": [], "recall": []}
    total = max(1, sum(calls)) * profile.total_heads
    layout = profile.known_layout
    matters = dict(zip(profile.layers, sensitivity.layers, strict=True))
    for stage, layer in itertools.product(range(len(stages)), profile.layers):
        scores, table = profile.scores[stage, layer], costs[profile.heads[layer]]
        share = scores["norm"] / scores["norm"].sum().clamp_min(1e-20)
        columns["error"].append(profile.relative_error(stage, layer))
        columns["recall"].append(scores["recall"] / scores["rows"][:, None])
        for head, patterns in enumerate(profile.candidates(stage, layer)):
            dens = densities(patterns, layout)
            cost = table.prices(patterns.kinds, dens, calls[stage])
            columns["density"].append(torch.tensor([dens], dtype=torch.float64))
            columns["seconds"].append(torch.tensor([cost], dtype=torch.float64))
            units.append((stage, layer, head))
            candidates.append(patterns)
            importance.append(sensitivity.stages[stage] * matters[layer] * share[head].item())
            weight.append(calls[stage] / total)
            stock.append(table.stock_seconds * calls[stage])
    joined = {name: torch.cat(parts).double() for name, parts in columns.items()}
    return Problem(
        units,
        candidates,
        torch.tensor(importance, dtype=torch.float64),
        weight=torch.tensor(weight, dtype=torch.float64),
        stages=stages,
        stock_seconds=torch.tensor(stock, dtype=torch.float64),
        other_seconds=max(0.0, dense_generation - sum(stock)),
        seconds=joined["seconds"],
        error=joined["error"],
        density=joined["density"],
        recall=joined["recall"],
    )


def evaluate(problem: Problem, pick: Tensor) -> Choice:
    """What a choice comes to."""

    def of(values: Tensor) -> Tensor:
        return values.gather(1, pick[:, None])[:, 0]

    loss = of(problem.loss).sum().item()
    sparse = torch.zeros(len(pick), dtype=torch.bool)  # for each layer, whether a head of it is
    sparse[problem.layer_of[pick > 0]] = True
    attention = torch.where(sparse[problem.layer_of], of(problem.seconds), problem.stock_seconds)
    seconds = problem.other_seconds + attention.sum().item()
    error = math.sqrt(loss / max(problem.importance.sum().item(), 1e-30))
    dens = (of(problem.density) * problem.weight).sum().item() / problem.weight.sum().item()
    return Choice(pick, loss, seconds, problem.dense_seconds / seconds, error, dens)


def all_dense(problem: Problem) -> Choice:
    """No unit is sparse."""
    return evaluate(problem, torch.zeros(len(problem.units), dtype=torch.int64))


def at_price(problem: Problem, price: float) -> Choice:
    """Every unit takes the candidate of least `seconds + price * loss`."""
    return evaluate(problem, (problem.seconds + price * problem.loss).argmin(1))


def cheapest(problem: Problem, good: Callable[[Choice], bool]) -> Choice:
    """The fastest choice on the hull that is good; all dense if none is.

    Args:
        problem: The units, with what each of their candidates costs and spoils.
        good: Must hold for all choices with less loss than one it holds for.
    """
    low, high = -6.0, 12.0  # log10 of seconds per loss
    best = all_dense(problem)
    for _ in range(40):
        middle = (low + high) / 2
        choice = at_price(problem, 10**middle)
        if good(choice):
            best, high = choice, middle
        else:
            low = middle
    return best


def least_loss(problem: Problem, speedup: float) -> Choice | None:
    """The choice of least loss on the hull that reaches the speed-up; None if none does."""
    low, high, best = -6.0, 12.0, None
    for _ in range(40):
        middle = (low + high) / 2
        choice = at_price(problem, 10**middle)
        if choice.speedup >= speedup:
            best, low = choice, middle
        else:
            high = middle
    return best


def runner_up(problem: Problem, choice: Choice) -> Tensor:
    """For each unit the candidate of least loss among the others that cost no more, int64 `[U]`."""
    chosen = choice.pick[:, None]
    cost = problem.seconds.gather(1, chosen)
    loss = problem.loss.masked_fill(problem.seconds > cost * 1.0001, torch.inf)
    loss = loss.scatter(1, chosen, torch.inf)
    second = loss.argmin(1)
    return torch.where(loss.gather(1, second[:, None])[:, 0].isinf(), -1, second)


def pair_shares(
    parts: Mapping[str, ComponentProfile], calls: Mapping[str, Sequence[int]]
) -> dict[str, float]:
    """Each transformer's share in the query-key pairs of a dense generation's attention.

    Args:
        parts: Profiles, by component name.
        calls: For each component and stage the forwards of a generation, times the batch.
    """
    pairs = {
        name: sum(calls[name]) * part.total_heads * part.known_layout.seq_len**2
        for name, part in parts.items()
    }
    total = max(1, sum(pairs.values()))
    return {name: count / total for name, count in pairs.items()}


def whole_problem(
    parts: Mapping[str, ComponentProfile],
    sensitivities: Mapping[str, Sensitivity],
    costs: Mapping[str, Costs],
    calls: Mapping[str, Sequence[int]],
    dense_generation: float,
) -> Problem:
    """The problem of a pipeline, of what `problem` takes for each of its transformers, by component name."""
    problems = {
        name: problem(
            part, stages_of(part.sigmas), sensitivities[name], costs[name], calls[name],
            dense_generation,
        )
        for name, part in parts.items()
    }  # fmt: skip
    return joined(problems, pair_shares(parts, calls), dense_generation)


def joined(
    parts: Mapping[str, Problem], shares: Mapping[str, float], dense_generation: float
) -> Problem:
    """One problem of all units; its stages are those of one transformer after the other.

    Args:
        parts: Problem of each transformer, by component name.
        shares: The share of each transformer in the query-key pairs of a generation, see `pair_shares`.
        dense_generation: Seconds of a whole dense generation.
    """
    placed, first = [], 0
    for name, part in parts.items():
        units = [(first + stage, layer, head) for stage, layer, head in part.units]
        placed.append(replace(part, units=units, weight=part.weight * shares[name]))
        first += len(part.stages)
    columns = {
        field: torch.cat([getattr(part, field) for part in placed])
        for field in (
            "importance", "seconds", "stock_seconds", "error", "density", "recall", "weight",
        )
    }  # fmt: skip
    stock = sum(columns["stock_seconds"].tolist())
    return Problem(
        [unit for part in placed for unit in part.units],
        [patterns for part in placed for patterns in part.candidates],
        **columns,
        stages=tuple(stage for part in placed for stage in part.stages),
        other_seconds=max(0.0, dense_generation - stock),
        components=tuple(name for name, part in parts.items() for _ in part.stages),
        saved_seconds=sum(part.saved_seconds for part in placed),
    )
