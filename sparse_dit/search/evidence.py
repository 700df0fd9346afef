"""What backs a search's choice, for the plan's own record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .dependence import depends, prompt_dependence
from .error_bar import damage_error
from .exact import certify
from .profile import ComponentProfile
from .solve import Choice, Problem

CERTIFIED_UNITS = 5000  # larger integer programs take minutes to write down alone
CERTIFY_SECONDS = 5.0


def evidence(
    parts: Mapping[str, ComponentProfile], problem: Problem, choice: Choice
) -> dict[str, Any]:
    """How far off a choice and its forecast may be, and which heads depend on the prompt; JSON-ready.

    `row_error` is one standard error of the forecast damage that comes from sampling rows, relative to it.
    `gap` is the share of the damage that a better choice of the same candidates, as fast, could save at most;
    None if the problem is too large to prove it. `prompt_dependent` lists for each transformer and layer the
    `[stage, head]` whose important tiles or columns depend on the prompt.

    Args:
        parts: The transformers' profiles, by component name.
        problem: The problem that was made of all of them.
        choice: The candidate of each unit of that problem.
    """
    bar = damage_error(parts, problem, choice.pick)
    gap = None
    if len(problem.units) <= CERTIFIED_UNITS:
        gap = certify(problem, choice, time_limit=CERTIFY_SECONDS).gap
    return {
        "row_error": round(bar / choice.damage, 4) if choice.damage > 0 else 0.0,
        "gap": None if gap is None else round(gap, 6),
        "prompt_dependent": {
            name: _dependent(name, part, problem, choice) for name, part in parts.items()
        },
    }


def _dependent(
    name: str, part: ComponentProfile, problem: Problem, choice: Choice
) -> dict[str, list[list[int]]]:
    """For each layer the `[stage, head]` whose pattern keeps tiles or columns that depend on the prompt."""
    regrets, result = prompt_dependence(part), {}
    for unit in problem.units_of(name).tolist():
        stage, layer, head = problem.units[unit]
        level = problem.level_of[stage]
        pattern = problem.candidates[unit][int(choice.pick[unit])]
        regret = regrets.get((level, layer))
        if regret is not None and depends(regret[head], pattern):
            result.setdefault(layer, []).append([level, head])
    return result
