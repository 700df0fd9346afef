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
    """JSON-ready: how far off the choice and its forecast may be, and which heads' prompts matter.

    `row_error` is one standard error of the forecast damage, relative, from row sampling; `gap` how much of
    the damage a better choice of the same candidates, as fast, could save at most (None if the case is too
    large to prove it); `prompt_dependent` for each transformer and layer the `[stage, head]` whose best
    places depend on the prompt.

    Args:
        parts: Profiles, by component name.
        problem: What was made of them.
        choice: Of it.
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
    """By layer, the heads whose chosen pattern is of places that depend on the prompt."""
    regrets, result = prompt_dependence(part), {}
    for unit in problem.units_of(name).tolist():
        stage, layer, head = problem.units[unit]
        level = problem.level_of[stage]
        pattern = problem.candidates[unit][int(choice.pick[unit])]
        regret = regrets.get((level, layer))
        if regret is not None and depends(regret[head], pattern):
            result.setdefault(layer, []).append([level, head])
    return result
