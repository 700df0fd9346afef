"""What backs a search's choice, for the plan's own record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .dependence import depends, prompt_dependence
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


def damage_error(parts: Mapping[str, ComponentProfile], problem: Problem, pick: Tensor) -> float:
    """One standard error of a choice's forecast damage, in the damage's unit, from row sampling alone.

    Heads of a layer are scored on the same rows, so their errors are added up as if they went together;
    layers and noise levels have rows of their own, and are added in squares. The bar is wide rather than
    narrow: rows are drawn from equal stretches of the video, which spreads them better than free draws would.
    What it leaves out: other prompts, and what a squared error at a noise level does to the video.

    Args:
        parts: Profiles that the problem was made of, by component name.
        problem: The problem of all transformers; it says which one each of its stages is of.
        pick: int64 `[U]`, the candidate of each unit.

    Raises:
        ValueError: If a unit's place or candidate isn't in the profile.
    """
    together: dict[tuple[int, str], float] = {}
    columns = zip(problem.units, problem.importance.tolist(), pick.tolist(), strict=True)
    for (stage, layer, head), importance, candidate in columns:
        profile, level = parts[problem.components[stage]], problem.level_of[stage]
        if (level, layer) not in profile.scores:
            raise ValueError(
                f"{layer} at noise level {level} isn't in the profile; profile it first"
            )
        errors = profile.standard_error(level, layer)
        if not candidate < errors.shape[1]:
            raise ValueError(
                f"the profile has {errors.shape[1]} candidates, got number {candidate}"
            )
        known = together.get((stage, layer), 0.0)
        together[stage, layer] = known + importance * errors[head, candidate].item()
    return math.sqrt(sum(error**2 for error in together.values()))
