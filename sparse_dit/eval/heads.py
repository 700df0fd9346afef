"""Every head's error and attention recall under a plan, on a prompt that the search has not seen."""

from __future__ import annotations

from typing import Any

from ..generation import Case, GenerationSettings
from ..integrations import attached, components, workload
from ..on_cpu import on_cpu
from ..plan import Plan
from ..search.scorer import Key, Scored, plan_scorer

ROWS = 48

HeadQuality = dict[Key, Scored]  # by stage and layer; one pattern a head


@on_cpu
def head_quality(
    pipe: Any, plan: Plan, case: Case, settings: GenerationSettings
) -> dict[str, HeadQuality]:
    """Run the stock pipeline once and measure sampled rows of every head that the plan names.

    Errors are defined as those in the plan are; see `search.scorer`.

    Args:
        pipe: A stock pipeline; stock again on return.
        plan: The plan that is evaluated; patterns with cells smaller than a tile are not supported.
        case: Prompt and seed.
        settings: Size and steps.

    Returns:
        For each component the sums of each (stage, layer) that the run came through.

    Raises:
        NotImplementedError: If a pattern's cells are not whole tiles.
    """
    modules = components(pipe)
    scorers = {name: plan_scorer(plan, name, modules[name], ROWS) for name in plan.components}
    with attached(pipe, scorers):
        workload(pipe, settings).run(case)
    return {name: scorer.found for name, scorer in scorers.items()}
