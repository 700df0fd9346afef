"""Each baseline's plan of least forecast loss at a density: its best parameters, by the calibration data.

Every baseline may run the first noise levels dense, as the published ones do, if that serves it better: the
others then get what is left of the density.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...layout import TokenLayout
from ...plan import HeadChoice, Plan
from ...search.assemble import levels_of
from ...search.candidates import DENSE
from ...search.engine import Searched, plan_of
from ...search.local import improve
from ...search.seen import density
from ...search.solve import Problem, evaluate
from .rule import best_rule
from .scores import BaselineScores
from .uniform import random_choice

RANDOM_DRAWS = 400  # ten times the choices that a search of ours evaluates


@dataclass(frozen=True, eq=False)
class _Case:
    """One baseline's task. S noise levels, L layers, H heads.

    Args:
        scores: The errors and densities of the baselines' patterns.
        importance: `[S, L, H]`, expected change of the video for a squared relative error of 1.
        share: `[S]`, share of each level in the attention calls; it sums to 1.
        target: The density that the plan may not exceed.
    """

    scores: BaselineScores
    importance: Tensor
    share: Tensor
    target: float

    def levels(self) -> list[tuple[int, float]]:
        """Numbers of first levels that may be dense, with the density left for the others."""
        result = []
        for warm in range(len(self.share)):
            dense = self.share[:warm].sum().item()
            if dense < self.target:
                result.append((warm, (self.target - dense) / (1 - dense)))
        return result


_Picked = tuple[float, Tensor]  # loss, pick [S, L, H] with -1 for dense


def baseline_plan(
    name: str, searched: Searched, scores: BaselineScores, target: float
) -> Plan | None:
    """The plan of a baseline at a density not above `target`; None if it has none there.

    Args:
        name: A name in `BASELINES`.
        searched: The search whose profile, sensitivity and stages are used.
        scores: The errors and densities of the baselines' patterns, see `score_baselines`.
        target: The density that the plan may not exceed.
    """
    if name == "random":
        return _random(searched, target)
    task, ((component, part),) = searched.problem, searched.profile.components.items()
    shape = (len(task.stages), len(part.layers), part.num_heads)
    importance = task.importance.view(shape)
    share = task.weight.view(shape).sum((1, 2))
    picked = BASELINES[name](_Case(scores, importance, share / share.sum(), target))
    if picked is None:
        return None
    rows: dict[str, tuple[tuple[HeadChoice, ...], ...]] = {}
    density = 0.0
    for place, layer in enumerate(part.layers):
        stages = []
        for level in range(shape[0]):
            heads = []
            for head in range(shape[2]):
                number = int(picked[1][level, place, head])
                pattern = DENSE if number < 0 else scores.patterns[level, layer, head][number]
                dens = 1.0 if number < 0 else scores.density[level, place, head, number].item()
                density += share[level].item() / share.sum().item() * dens / shape[1] / shape[2]
                heads.append(HeadChoice(pattern))
            stages.append(tuple(heads))
        rows[layer] = tuple(stages)
    base = searched.plan
    stages = levels_of(searched.problem, component)
    parts = {component: replace(base.components[component], stages=stages, layers=rows)}
    return Plan(base.pipeline_class, parts, round(min(1.0, density), 6))


def _best(found: list[_Picked]) -> _Picked | None:
    return min(found, key=lambda picked: picked[0], default=None)


def _uniform(family: str) -> Callable[[_Case], _Picked | None]:
    def choose(case: _Case) -> _Picked | None:
        """One place in the family for all heads: one pattern, or for blocks as many of a row."""
        error, dens = case.scores.error, case.scores.density
        found = []
        for warm, left in case.levels():
            for number in case.scores.places.get(family, []):  # large videos have no blocks
                if dens[..., number].max() <= left:
                    pick = torch.full(case.importance.shape, number)
                    pick[:warm] = -1
                    loss = (case.importance * error[..., number])[warm:].sum().item()
                    found.append((loss, pick))
        return _best(found)

    return choose


def _two_classes(case: _Case) -> _Picked | None:
    """For each head and level the better of a spatial and a temporal band of about equal density."""
    error, dens, found = case.scores.error, case.scores.density[0, 0, 0], []
    for warm, left in case.levels():
        for spatial in case.scores.places["spatial"]:
            for temporal in case.scores.places["temporal"]:
                if max(dens[spatial], dens[temporal]) > left:
                    continue
                first = error[..., spatial] <= error[..., temporal]
                pick = torch.where(first, spatial, temporal)
                pick[:warm] = -1
                least = torch.minimum(error[..., spatial], error[..., temporal])
                found.append(((case.importance * least)[warm:].sum().item(), pick))
    return _best(found)


def _epsilon_lambda(case: _Case) -> _Picked | None:
    """Sparse-vDiT's rule on the errors of stock inputs."""
    found = best_rule(case.scores, case.importance, case.share, case.target)
    return found and found[:2]


def _random(searched: Searched, target: float) -> Plan | None:
    """The best of many random choices, by forecast loss."""
    task, best = searched.problem, None
    for seed in range(RANDOM_DRAWS):
        choice = random_choice(task, target, seed)
        if choice.density <= target + 0.005 and (best is None or choice.loss < best.loss):
            best = choice
    return None if best is None else plan_of(searched, best)


def least_loss_at_density(
    searched: Searched, target: float, layout: TokenLayout | None = None
) -> Plan:
    """Our own plan at a density: the choice of least loss on the hull, which then spends the density left.

    Args:
        searched: The result of a search, whose problem is chosen from.
        target: The density that the plan may not exceed.
        layout: The token layout at which the density counts, if not the searched one. The loss is always
            that at the searched size, as no error is known at another one.
    """
    task = searched.problem
    if layout is not None:
        task = replace(task, density=_density_at(task, layout))
    low, high = -12.0, 12.0  # log10 of share of the pairs per loss
    work = task.density * task.weight[:, None]
    best = evaluate(task, work.argmin(1))
    for _ in range(60):
        middle = (low + high) / 2
        choice = evaluate(task, (work + 10**middle * task.loss).argmin(1))
        if choice.density <= target:
            best, low = choice, middle
        else:
            high = middle
    # shares of the pairs for seconds, beside one second, as a plan may compute none
    pairs = replace(task, seconds=work, stock_seconds=task.weight, other_seconds=1.0)
    start = evaluate(pairs, best.pick)
    spent = improve(pairs, start, seconds=max(1 + target, start.seconds))
    return plan_of(searched, evaluate(task, spent.pick))


def _density_at(task: Problem, layout: TokenLayout) -> Tensor:
    """The density of every unit's candidates at another size, float64 `[U, K]`."""
    rows = [[density(pattern, layout) for pattern in listed] for listed in task.candidates]
    return torch.tensor(rows, dtype=torch.float64)


BASELINES: dict[str, Callable[[_Case], _Picked | None]] = {
    "window": _uniform("window"),
    "two classes": _two_classes,
    "sliding tile": _uniform("tile"),
    "radial": _uniform("radial"),
    "row-wise blocks": _uniform("blocks"),
    "epsilon-lambda": _epsilon_lambda,
}
METHODS = ("searched", *BASELINES, "random")
SOURCES: dict[str, str] = {
    "searched": "ours",
    "window": "one window for all heads (NATTEN)",
    "two classes": "spatial or temporal band for each head (Sparse VideoGen)",
    "sliding tile": "one window of tiles for all heads (Sliding Tile Attention)",
    "radial": "one radial mask for all heads (Radial Attention)",
    "row-wise blocks": "top blocks of each row, chosen once (as AdaSpa)",
    "epsilon-lambda": "five modes by loss and threshold (Sparse-vDiT)",
    "random": f"the best of {RANDOM_DRAWS} random choices from our own candidates",
}


def plan_at(name: str, searched: Searched, scores: BaselineScores, target: float) -> Plan | None:
    """The plan of any of `METHODS` at a density not above `target`; None if it has none there."""
    if name == "searched":
        return least_loss_at_density(searched, target)
    return baseline_plan(name, searched, scores, target)
