"""Searches of the same settings, one after the other: how far their plans and their videos are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..integrations import components, workload
from ..patterns import Pattern
from ..plan import Plan
from ..search.assemble import first_plan
from ..search.cost import Costs
from ..search.local import at_coupled_price
from ..search.pricing import cost_tables
from ..search.profile import ComponentProfile
from ..search.profiling import profile_pipeline
from ..search.sensitivity import Sensitivity, sensitivity
from ..search.solve import Choice, Problem, joined, problem, stages_of
from ..words import option
from .stability_file import RepeatRow, StabilityRequest, StabilityState

Say = Callable[[str], None]
_REST = 1e-3  # of a dense generation, outside of attention; not 0, as all heads may be skipped


def repeat_searches(
    pipe: Any,
    name: str,
    request: StabilityRequest,
    state: StabilityState,
    psnr: Callable[[Plan], list[float]],
    say: Say,
) -> None:
    """Search so often as asked for, with everything measured anew, and compare the plans.

    Each profiles, measures sensitivities and times costs, and takes the choice by time that has the wanted
    density. Plans lie in the folder of the profiles, so that a stopped call goes on. Equal plans give equal
    videos, so one of them is generated with.

    Args:
        pipe: A diffusers pipeline with one transformer, not patched.
        name: The name of the transformer.
        request: What to compare.
        state: What is known already; `repeats` of it is filled and written.
        psnr: Generates the held-out prompts with a plan: PSNR of each, in dB.
        say: Called with a line of text before each step.

    Raises:
        ValueError: If the density is out of reach.
    """
    plans = [_searched(pipe, name, request, state, n, say) for n in range(request.repeats)]
    if not state.repeats:
        first = _patterns(plans[0], name)
        state.repeats = [
            RepeatRow(plan.density, plan.forecast["error"], _alike(_patterns(plan, name), first))
            for plan in plans
        ]
        state.write()
    for number, row in enumerate(state.repeats):
        if not request.generate or row.psnr is not None:
            continue
        same = (n for n in range(number) if plans[n].components == plans[number].components)
        if (before := next(same, None)) is None:
            say(f"held-out prompts with the plan of search {number + 1}")
            found = psnr(plans[number])
        else:
            say(f"search {number + 1} gave the plan of search {before + 1}")
            found = state.repeats[before].psnr
        state.repeats[number] = replace(row, psnr=found)
        state.write()


def spread_of(rows: Sequence[RepeatRow]) -> tuple[float, float, float, float] | None:
    """How far repeated searches and prompts are apart, in dB; None if no videos were generated.

    Returns:
        The greatest distance between searches on a single prompt, that of their means over prompts, and the
        least and the greatest PSNR of a prompt, means over searches.
    """
    every = [row.psnr for row in rows if row.psnr]
    if not every:
        return None
    by_prompt = list(zip(*every, strict=True))
    means = [sum(found) / len(found) for found in every]
    prompts = [sum(found) / len(found) for found in by_prompt]
    apart = max(max(found) - min(found) for found in by_prompt)
    return apart, max(means) - min(means), min(prompts), max(prompts)


def _searched(
    pipe: Any, name: str, request: StabilityRequest, state: StabilityState, number: int, say: Say
) -> Plan:
    """The plan of one search; read, if it lies there already."""
    file = request.profiles / f"search-{number + 1}.json"
    if file.exists():
        known = Plan.load(file)
        if known.provenance.get("conditions") == state.conditions:
            return known
    say(f"search {number + 1} of {request.repeats}: profile, sensitivity and costs")
    part = _profiled(pipe, name, request, file.with_name(f"{file.stem}-profile.safetensors"), say)
    stages = stages_of(part.sigmas)
    small = workload(pipe, request.settings).reduced()
    weights = sensitivity(small, name, stages, part.layers, request.calibration[0])
    modules = {name: components(pipe)[name]}
    (costs,) = cost_tables(modules, {name: part}, "auto", None).values()
    task = _problem(name, part, weights, costs)
    choice = _at_density(task, request.density)
    plan = first_plan(type(pipe).__name__, {name: part}, task, choice, {name: costs})
    plan = replace(plan, provenance={"conditions": state.conditions})
    plan.save(file, overwrite=True)
    return plan


def _profiled(
    pipe: Any, name: str, request: StabilityRequest, file: Path, say: Say
) -> ComponentProfile:
    profile = profile_pipeline(
        pipe,
        request.calibration[: request.counts[-1]],
        replace(request.settings, steps=request.profile_steps),
        rows=request.rows,
        path=file,
        beyond=False,  # all is judged at this size
        say=say,
    )
    return profile.components[name]


def _problem(name: str, part: ComponentProfile, weights: Sensitivity, costs: Costs) -> Problem:
    """The problem at the costs that were timed; a noise level counts as much as any other."""
    stages = stages_of(part.sigmas)
    stock = sum(
        costs[part.heads[layer]].stock_seconds * part.heads[layer][0] for layer in part.layers
    ) * len(stages)
    whole = stock * (1 + _REST)
    task = problem(part, stages, weights, costs, [1] * len(stages), whole)
    return joined({name: task}, {name: 1.0}, whole)


def _at_density(task: Problem, density: float) -> Choice:
    """The choice by time that is the densest within the density.

    Raises:
        ValueError: If there is none.
    """
    low, high, best = -12.0, 12.0, None  # log10 of seconds per loss, both relative
    unit = task.dense_seconds / max(task.loss.max().item(), 1e-300)
    for _ in range(60):
        middle = (low + high) / 2
        choice = at_coupled_price(task, unit * 10**middle)
        if choice.density <= density:
            best, low = choice, middle
        else:
            high = middle
    if best is None:
        least = (task.density.amin(1) * task.weight).sum().item()
        raise ValueError(
            f"{option('density')} must be at least {least:.3f} at this size, got {density}"
        )
    return best


def _patterns(plan: Plan, name: str) -> list[Pattern]:
    """The pattern of each layer, stage and head."""
    return [
        head.pattern
        for stages in plan.components[name].layers.values()
        for heads in stages
        for head in heads
    ]


def _alike(patterns: Sequence[Pattern], others: Sequence[Pattern]) -> float:
    """Share of the heads with the same pattern in both plans."""
    same = sum(a == b for a, b in zip(patterns, others, strict=True))
    return round(same / len(patterns), 4)
