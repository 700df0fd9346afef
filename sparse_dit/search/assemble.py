"""A choice as a plan, with what is known of each head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ..plan import ComponentPlan, HeadChoice, Plan, Stage
from .cost import Costs
from .profile import ComponentProfile
from .solve import Choice, Problem, runner_up

Told = TypeVar("Told")
Layers = dict[str, tuple[tuple[HeadChoice, ...], ...]]


def first_plan(
    pipeline_class: str,
    parts: Mapping[str, ComponentProfile],
    task: Problem,
    choice: Choice,
    tables: Mapping[str, Costs],
) -> Plan:
    """A choice as a plan that holds for any number of tokens and has no provenance yet.

    Args:
        pipeline_class: The name of the pipeline's class.
        parts: The transformers' profiles, by component name.
        task: The problem of all transformers together.
        choice: The candidate of each unit of that problem.
        tables: What attention costs in each transformer, by component name.
    """
    components = {
        name: ComponentPlan(
            part.model_class,
            part.config_hash,
            part.heads,
            part.known_layout,
            levels_of(task, name),
            layers_of(name, part.layers, task, choice),
        )
        for name, part in parts.items()
    }
    return Plan(
        pipeline_class,
        components,
        round(choice.density, 6),
        forecast=forecast_of(task, choice),
        cost=one_or_named({name: _listed(costs) for name, costs in tables.items()}),
    )


def _listed(costs: Costs) -> dict[str, Any]:
    """JSON form of a transformer's costs."""
    return one_or_named({f"{n} heads of {d}": table.to_dict() for (n, d), table in costs.items()})


def levels_of(task: Problem, component: str) -> tuple[Stage, ...]:
    """A transformer's stages, one for each recorded noise level."""
    return tuple(task.stages[number] for number in task.stages_of(component))


def stage_shares(task: Problem) -> dict[str, list[float]]:
    """For each transformer and stage its share in the attention of a generation."""
    total = [0.0] * len(task.stages)
    for (stage, _, _), weight in zip(task.units, task.weight.tolist(), strict=True):
        total[stage] += weight
    return {
        name: [round(total[number], 9) for number in task.stages_of(name)]
        for name in dict.fromkeys(task.components)
    }


def layers_of(name: str, layers: Iterable[str], task: Problem, choice: Choice) -> Layers:
    """The choice of every head of a transformer, by layer and stage, with its error and the runner-up.

    Args:
        name: The transformer's component name.
        layers: Module paths of those of its layers that have units, in the plan's order.
        task: The problem of all transformers together.
        choice: The candidate of each unit of that problem.
    """
    second = runner_up(task, choice)
    rows: dict[str, list[list[HeadChoice]]] = {
        layer: [[] for _ in task.stages_of(name)] for layer in layers
    }
    for number in task.units_of(name).tolist():
        stage, layer, _ = task.units[number]
        pick, other = int(choice.pick[number]), int(second[number])
        patterns, error = task.candidates[number], task.error[number].sqrt()
        rows[layer][task.level_of[stage]].append(
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


def one_or_named(values: Mapping[str, Told]) -> Told | dict[str, Told]:
    """What is said of each transformer: once where it is the same for all, else by component name."""
    first, *others = values.values()
    return first if all(other == first for other in others) else dict(values)
