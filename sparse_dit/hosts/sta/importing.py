"""An STA strategy as a plan, which holds for any number of steps and any schedule."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ...integrations import components, heads_of, self_attention_layers
from ...layout import TokenLayout
from ...plan import ComponentPlan, HeadChoice, Plan, PlanError, Stage, config_hash
from ...version import VERSION
from .strategy import Strategy
from .windows import density, pattern_of


def import_sta(
    strategy: str | os.PathLike[str] | Strategy,
    pipe_or_transformer: Any,
    sigmas: Sequence[float],
    layouts: TokenLayout | Mapping[str, TokenLayout],
) -> Plan:
    """A strategy as a plan for a model: its steps become stages by noise level.

    Layers are numbered in the order in which the model has them, blocks of a second kind behind those of the
    first. A window as large as the grid is dense, and so it stays at other sizes. Of two transformers of one
    pipeline, both get the strategy, each at the noise levels that it runs.

    Args:
        strategy: The file, or what it says.
        pipe_or_transformer: The model that it is for.
        sigmas: The noise level of each of the strategy's steps, in order, falling.
        layouts: Where the tokens lie at the size that the strategy was found at, of each component by name.

    Raises:
        PlanError: If the file is no strategy, or its steps, layers or heads aren't the model's.
    """
    if not isinstance(strategy, Strategy):
        strategy = Strategy.load(strategy)
    found = components(pipe_or_transformer)
    if isinstance(layouts, TokenLayout):
        layouts = dict.fromkeys(found, layouts)
    steps, _, _ = strategy.shape
    if len(sigmas) != steps:
        raise PlanError(
            f"the strategy has {steps} steps, so there must be as many noise levels, got {len(sigmas)}; "
            f"give --steps {steps}"
        )
    stages, first_steps = _stages(strategy, sigmas)
    parts = {
        name: _part(strategy, module, layouts[name], stages, first_steps)
        for name, module in found.items()
    }
    layout = next(iter(layouts.values()))
    each = [
        density(w, layout.grid, layout.num_global) for s in strategy.windows for x in s for w in x
    ]
    alone = isinstance(pipe_or_transformer, nn.Module)
    lengths = [b - a for a, b in itertools.pairwise([*first_steps, steps])]
    provenance: dict[str, Any] = {
        "note": "imported from an STA strategy",
        "sparse_dit": VERSION,
        "recipe": "sparse_dit.hosts.sta.import_sta",
        "schedule": {"steps": steps, "sigmas": [round(s, 6) for s in sigmas]},
    }
    if len(parts) == 1:
        provenance["stage_shares"] = {name: [n / steps for n in lengths] for name in parts}
    return Plan(
        "" if alone else type(pipe_or_transformer).__name__,
        parts,
        sum(each) / len(each),
        provenance=provenance,
    )


def _stages(
    strategy: Strategy, sigmas: Sequence[float]
) -> tuple[tuple[Stage, ...], tuple[int, ...]]:
    """Steps that follow each other with the same windows as stages, and the first step of each.

    Stages end in the middle between two noise levels, so that a schedule that is off by little finds them.
    """
    if any(b >= a for a, b in itertools.pairwise(sigmas)) or not 0 <= sigmas[-1] <= sigmas[0] <= 1:
        raise PlanError("noise levels must fall from step to step, between 1 and 0")
    windows = strategy.windows
    first_steps = [t for t in range(len(windows)) if t == 0 or windows[t] != windows[t - 1]]
    edges = [1.0, *((sigmas[t - 1] + sigmas[t]) / 2 for t in first_steps[1:]), 0.0]
    return tuple(Stage(a, b) for a, b in itertools.pairwise(edges)), tuple(first_steps)


def _part(
    strategy: Strategy,
    module: nn.Module,
    layout: TokenLayout,
    stages: tuple[Stage, ...],
    first_steps: tuple[int, ...],
) -> ComponentPlan:
    layers, heads, config = list(self_attention_layers(module)), heads_of(module), module.config
    _, num_layers, num_heads = strategy.shape
    wanted = (len(layers), {num for num, _ in heads.values()})
    if (num_layers, {num_heads}) != wanted:
        raise PlanError(
            f"the strategy has {num_layers} layers of {num_heads} heads, and {type(module).__name__} has "
            f"{wanted[0]} of {sorted(wanted[1])}; use a strategy found for this model"
        )
    choices = {
        window: HeadChoice(pattern_of(window, layout.grid))
        for step in strategy.windows
        for layer in step
        for window in layer
    }
    return ComponentPlan(
        model_class=type(module).__name__,
        config_hash=config_hash(config),
        heads=heads,
        layout=layout,
        stages=stages,
        layers={
            layer: tuple(
                tuple(choices[window] for window in strategy.windows[t][number])
                for t in first_steps
            )
            for number, layer in enumerate(layers)
        },
    )
