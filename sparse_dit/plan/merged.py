"""Neighbouring stages in which every head does the same, as one stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .component import ComponentPlan, HeadChoice, Stage
from .plan import Plan


def merged(component: ComponentPlan) -> ComponentPlan:
    """The same choices in as few stages as there can be; what is computed doesn't change.

    Stages become one if they touch, are for the same branch, and give every head of every layer the
    same pattern. Of a head's expected errors the largest is kept; its runner-up if it is the same.

    Args:
        component: Any.
    """
    runs = equal_stages(component)
    if len(runs) == len(component.stages):
        return component
    ends = [(component.stages[run[0]], component.stages[run[-1]]) for run in runs]
    layers = {
        layer: tuple(
            tuple(_head(heads) for heads in zip(*(rows[i] for i in run), strict=True))
            for run in runs
        )
        for layer, rows in component.layers.items()
    }
    stages = tuple(Stage(top.sigma_max, low.sigma_min, top.branch) for top, low in ends)
    return replace(component, stages=stages, layers=layers)


def merged_plan(plan: Plan) -> Plan:
    """A plan with `merged` components; what its provenance says of stages goes along.

    `stage_shares` are added up; a head's best places depend on the prompt if they do at one of its levels.
    """
    runs = {name: equal_stages(part) for name, part in plan.components.items()}
    components = {name: merged(part) for name, part in plan.components.items()}
    provenance: dict[str, Any] = dict(plan.provenance)
    if "stage_shares" in provenance:
        provenance["stage_shares"] = {
            name: [sum(shares[i] for i in run) for run in runs[name]]
            for name, shares in provenance["stage_shares"].items()
        }
    evidence = provenance.get("evidence")
    if isinstance(evidence, dict) and "prompt_dependent" in evidence:
        provenance["evidence"] = {
            **evidence,
            "prompt_dependent": {
                name: {layer: _moved(places, runs[name]) for layer, places in layers.items()}
                for name, layers in evidence["prompt_dependent"].items()
            },
        }
    return replace(plan, components=components, provenance=provenance)


def _moved(places: list[list[int]], runs: list[list[int]]) -> list[list[int]]:
    """`[stage, head]` of each place, each once, where stages are runs of what they were."""
    number = {stage: place for place, run in enumerate(runs) for stage in run}
    return [list(place) for place in dict.fromkeys((number[stage], head) for stage, head in places)]


def equal_stages(component: ComponentPlan) -> list[list[int]]:
    """Numbers of the stages that can be one, in the order of the stages."""
    runs: list[list[int]] = []
    for number, stage in enumerate(component.stages):
        for run in reversed(runs):
            last = component.stages[run[-1]]
            if last.branch == stage.branch and last.sigma_min == stage.sigma_max:
                if _patterns(component, run[-1]) == _patterns(component, number):
                    run.append(number)
                    break
                runs.append([number])
                break
        else:
            runs.append([number])
    return runs


def _patterns(component: ComponentPlan, stage: int) -> list[tuple[Any, ...]]:
    return [tuple(head.pattern for head in rows[stage]) for rows in component.layers.values()]


def _head(heads: tuple[HeadChoice, ...]) -> HeadChoice:
    """One head over stages in which it has one pattern."""
    first = heads[0]
    same = all(head.runner_up == first.runner_up for head in heads)
    return HeadChoice(
        first.pattern,
        _largest([head.error for head in heads]),
        first.runner_up if same else None,
        _largest([head.runner_up_error for head in heads]) if same else None,
    )


def _largest(errors: list[float | None]) -> float | None:
    """None if one is unknown."""
    known = [error for error in errors if error is not None]
    return max(known) if len(known) == len(errors) else None
