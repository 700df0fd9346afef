"""Sparse-vDiT's rule, arXiv 2506.03065, Alg. 1: five modes for each head by loss and threshold.

Of skip, diagonal, multi-diagonal and vertical stripes of one density each, a head takes the one of least
`error + lambda * density`, and dense if that loss exceeds epsilon. The error is relative, as the paper's has
no scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .families import MODE_BUDGETS
from .scores import BaselineScores

LAMBDAS = (0.0, 0.1, 0.5, 1.0)
THRESHOLDS = 65  # values of epsilon that are tried: quantiles of the heads' losses


@dataclass(frozen=True)
class Rule:
    """The parameters of Sparse-vDiT's rule (arXiv 2506.03065) that its paper leaves open.

    Args:
        modes: The numbers of its patterns: skip, stripes and two diagonals.
        factor: The rule's lambda: how much density weighs against the error.
        epsilon: The largest loss of a head that runs sparse.
    """

    modes: tuple[int, ...]
    factor: float
    epsilon: float

    def __call__(self, error: Tensor, density: Tensor) -> Tensor:
        """Number of the pattern that each head takes, -1 for dense.

        Args:
            error, density: `[..., M]` of the modes.
        """
        least, which = (error + self.factor * density).min(-1)
        return torch.tensor(self.modes)[which].masked_fill(least > self.epsilon, -1)


def modes_of(places: Mapping[str, Sequence[int]], density: Tensor, budget: int) -> tuple[int, ...]:
    """Numbers of the modes' patterns for one of `MODE_BUDGETS`.

    Args:
        places: Numbers of each family's patterns.
        density: `[K]`, of all patterns of some head; that of the diagonals is the same for all.
        budget: Number of the budget.
    """
    modes = [places["skip"][0], places["vertical"][budget]]
    for family in ("spatial", "temporal"):
        listed = places[family]
        near = (density[list(listed)] - MODE_BUDGETS[budget]).abs().argmin()
        modes.append(listed[int(near)])
    return tuple(modes)


def picked_density(pick: Tensor, density: Tensor, share: Tensor) -> float:
    """The density of a whole generation: the mean over its attention calls and heads.

    Args:
        pick: The number of each head's pattern, int64 `[S, L, H]`; -1 for dense.
        density: The density of each head's K patterns, `[S, L, H, K]`.
        share: The share of each noise level in the attention calls, `[S]`; it sums to 1.
    """
    taken = density.gather(-1, pick.clamp_min(0)[..., None])[..., 0]
    return float(torch.where(pick < 0, 1.0, taken).mean((1, 2)) @ share)


def best_rule(
    scores: BaselineScores, importance: Tensor, share: Tensor, target: float
) -> tuple[float, Tensor, Rule] | None:
    """Loss, pick `[S, L, H]` (-1 for dense) and the rule of least loss at a density; None if none is
    so sparse. Densities, lambda and epsilon are tried, on the errors of stock inputs.

    Args:
        scores: The errors and densities of all patterns.
        importance: `[S, L, H]`, expected change of the video for a squared relative error of 1.
        share: The share of each noise level in the attention calls, `[S]`; it sums to 1.
        target: The density that the plan may not exceed.
    """
    found: list[tuple[float, Tensor, Rule]] = []
    for budget in range(len(MODE_BUDGETS)):
        modes = modes_of(scores.places, scores.density[0, 0, 0], budget)
        error, dens = scores.error[..., modes], scores.density[..., modes]
        for factor in LAMBDAS:
            least = (error + factor * dens).min(-1).values.flatten()
            for epsilon in least.quantile(torch.linspace(0, 1, THRESHOLDS).double()).tolist():
                rule = Rule(modes, factor, epsilon)
                pick = rule(error, dens)
                if picked_density(pick, scores.density, share) <= target:
                    taken = scores.error.gather(-1, pick.clamp_min(0)[..., None])[..., 0]
                    loss = (importance * taken.masked_fill(pick < 0, 0)).sum().item()
                    found.append((loss, pick, rule))
    return min(found, key=lambda entry: entry[0], default=None)
