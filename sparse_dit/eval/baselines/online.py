"""Rules that run without a plan, at a wanted density: their one number is found by generating."""

from __future__ import annotations

from typing import Any

from ...generation import Case, GenerationSettings
from ...integrations import workload
from ...online import RULES, online_plan
from ...patch import patch
from ...plan import Plan

RUNS = 6  # generations that halve the range of the number
MOST_TAU = 4.0  # deviations above which hardly a block lies


def rule_plan_at(
    pipe: Any, name: str, target: float, case: Case, settings: GenerationSettings
) -> Plan | None:
    """The plan of a rule whose generation of a case computes at most a share of the pairs; None without one.

    Args:
        pipe: A stock pipeline; stock again on return.
        name: A name in `RULES`.
        target: The density that may not be exceeded.
        case: Calibration prompt and seed.
        settings: Size, steps, guidance.
    """
    option, _, least, most = RULES[name].option
    most = min(most, MOST_TAU)
    sparse, dense = (least, most) if option in ("density", "threshold", "top_p") else (most, least)
    best = None
    value = sparse
    for _ in range(RUNS):
        plan = online_plan(pipe, name, **{option: value})
        if _density(pipe, plan, case, settings) <= target:
            best, sparse = plan, value
        elif best is None:
            return None
        else:
            dense = value
        value = (sparse + dense) / 2
    return best


def _density(pipe: Any, plan: Plan, case: Case, settings: GenerationSettings) -> float:
    """The density of a generation."""
    with patch(pipe, plan) as handle:
        workload(pipe, settings).run(case)
        density = handle.summary().density
    assert density is not None, "something ran"
    return density
