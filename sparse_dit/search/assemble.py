"""A choice as a plan, with the evidence for each head."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..plan import ComponentPlan, HeadChoice, Plan
from .cost import CostTable
from .profile import ComponentProfile
from .solve import Choice, Problem, runner_up

if TYPE_CHECKING:
    from .engine import Searched

Layers = dict[str, tuple[tuple[HeadChoice, ...], ...]]


def plan_of(searched: Searched, choice: Choice) -> Plan:
    """Any choice of a search's problem as a plan, for the same model at the same size.

    What the search measured of its own plan (quality, speed-up) doesn't hold for it and is left out.

    Args:
        searched: Result of `search_plan`.
        choice: Of `searched.problem`; see `solve` and `baselines.random_choice`.
    """
    plan, task = searched.plan, searched.problem
    ((name, part),) = searched.profile.components.items()
    return replace(
        plan,
        components={name: replace(plan.components[name], layers=layers_of(part, task, choice))},
        density=round(choice.density, 6),
        provenance={**plan.provenance, "objective": {}},
        forecast=forecast_of(task, choice),
        measured={},
    )


def first_plan(
    pipeline_class: str,
    name: str,
    part: ComponentProfile,
    task: Problem,
    choice: Choice,
    table: CostTable,
) -> Plan:
    """A choice as a plan that holds for any number of tokens and has no provenance yet."""
    component = ComponentPlan(
        part.model_class,
        part.config_hash,
        part.num_heads,
        part.head_dim,
        part.known_layout,
        task.stages,
        layers_of(part, task, choice),
    )
    return Plan(
        pipeline_class,
        {name: component},
        round(choice.density, 6),
        forecast=forecast_of(task, choice),
        cost=table.to_dict(),
    )


def layers_of(part: ComponentProfile, task: Problem, choice: Choice) -> Layers:
    """What each head of each layer gets at each stage, with its error and the runner-up."""
    second = runner_up(task, choice)
    rows: dict[str, list[list[HeadChoice]]] = {
        layer: [[] for _ in task.stages] for layer in part.layers
    }
    for number, (stage, layer, _) in enumerate(task.units):
        pick, other = int(choice.pick[number]), int(second[number])
        patterns, error = task.candidates[number], task.error[number].sqrt()
        rows[layer][stage].append(
            HeadChoice(
                patterns[pick],
                round(error[pick].item(), 6),
                patterns[other] if other >= 0 else None,
                round(error[other].item(), 6) if other >= 0 else None,
            )
        )
    return {layer: tuple(map(tuple, stages)) for layer, stages in rows.items()}


def forecast_of(task: Problem, choice: Choice) -> dict[str, float]:
    """The `forecast` of a plan."""
    return {
        "speedup": round(choice.speedup, 4),
        "error": round(choice.error, 6),
        "seconds": round(choice.seconds, 4),
        "dense_seconds": round(task.dense_seconds, 4),
    }
