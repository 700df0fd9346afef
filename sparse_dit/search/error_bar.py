"""How far row sampling may have moved what a choice is forecast to do."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from .profile import ComponentProfile
from .solve import Problem


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
