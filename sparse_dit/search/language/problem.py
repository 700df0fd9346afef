"""What each pattern costs and spoils in each head, for the solver, and its choice as a plan's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...integrations import heads_of
from ...modalities import MODALITIES, Modality
from ...plan import HeadChoice, Stage
from ..assemble import Layers, layers_of
from ..solve import Choice, Problem
from .candidates import by_modality
from .costs import Costs
from .scores import COMPONENT, LayerScores

Scores = dict[str, dict[Modality, LayerScores]]
PREFILL = Stage(1.0, 0.0, phase="prefill")


def problem_of(
    model: Any,
    layers: dict[str, dict[Modality, LayerScores]],
    patterns: Sequence[Any],
    costs: Costs,
    dense_seconds: float,
) -> Problem:
    """What each pattern costs and spoils in each head of the scored layers.

    Args:
        model: The model.
        layers: The scores, by layer and modality. Rows of each modality make a choice of their own, and stand
            in the problem as a stage does.
        patterns: The K patterns, dense first.
        costs: What attention of one layer costs; all are alike.
        dense_seconds: What a whole dense reading takes.
    """
    parts = modalities_of(layers)
    scored = [
        (m, layer, found[name]) for m, name in enumerate(parts) for layer, found in layers.items()
    ]
    units = [(m, layer, head) for m, layer, s in scored for head in range(len(s.norm))]
    items = sum(s.pairs for s in next(iter(layers.values())).values())  # each item's pairs sum to 1

    def table(values: Callable[[LayerScores], Tensor]) -> Tensor:
        return torch.cat([values(scores) for _, _, scores in scored])

    count = len(units)
    loss = table(lambda s: s.loss)
    share = table(lambda s: torch.full_like(s.norm, s.pairs / items))
    stock = costs.stock * share
    every = sum(heads for heads, _ in heads_of(model).values())
    return Problem(
        units,
        [patterns] * count,
        importance=loss.amax(1),
        seconds=torch.tensor(costs.sparse, dtype=torch.float64) * share[:, None],
        stock_seconds=stock,
        error=table(lambda s: s.error / s.norm[:, None].clamp_min(1e-20)),
        density=table(lambda s: s.density / s.texts),
        recall=torch.ones(count, len(patterns), dtype=torch.float64),
        weight=share / every,
        stages=(PREFILL,) * len(parts),
        other_seconds=max(0.0, dense_seconds - stock.sum().item()),
        components=(COMPONENT,) * len(parts),
        measured=loss,
    )


def planned(scores: Scores, task: Problem, choice: Choice) -> Layers:
    """A choice as the heads of each layer, in prefill."""
    parts = modalities_of(scores)
    layers = layers_of(COMPONENT, scores, task, choice)
    if len(parts) == 1:
        return layers
    return {layer: (_joined(parts, stages),) for layer, stages in layers.items()}


def modalities_of(layers: dict[str, dict[Modality, LayerScores]]) -> list[Modality]:
    """The modalities that were scored, in the order of `MODALITIES`."""
    return [name for name in MODALITIES if any(name in found for found in layers.values())]


def _joined(
    parts: Sequence[Modality], choices: Sequence[Sequence[HeadChoice]]
) -> tuple[HeadChoice, ...]:
    """Each head's choices for the rows of each modality as one."""
    return tuple(
        HeadChoice(by_modality(dict(zip(parts, [one.pattern for one in head], strict=True))))
        for head in zip(*choices, strict=True)
    )
