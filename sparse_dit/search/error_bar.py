"""How far row sampling may have moved what a choice is forecast to do."""

from __future__ import annotations

import math

from torch import Tensor

from .profile import ComponentProfile
from .solve import Problem


def damage_error(profile: ComponentProfile, problem: Problem, pick: Tensor) -> float:
    """One standard error of a choice's forecast damage, in the damage's unit, from row sampling alone.

    Heads of a layer are scored on the same rows, so their errors are added up as if they went together;
    layers and noise levels have rows of their own, and are added in squares. The bar is wide rather than
    narrow: rows are drawn from equal stretches of the video, which spreads them better than a lot would.
    What it leaves out: other prompts, and what a squared error at a noise level does to the video.

    Args:
        profile: What the problem was made of.
        problem: Of one transformer; units are `(noise level, layer, head)`.
        pick: int64 `[U]`, the candidate of each unit.

    Raises:
        ValueError: If a unit's place or candidate isn't in the profile, or the problem is of several
            transformers.
    """
    if len(several := sorted(set(problem.components))) > 1:
        raise ValueError(
            f"the problem must be of one transformer, got {' and '.join(several)}; "
            "make one of each with solve.problem"
        )
    together: dict[tuple[int, str], float] = {}
    columns = zip(problem.units, problem.importance.tolist(), pick.tolist(), strict=True)
    for (level, layer, head), importance, candidate in columns:
        if (level, layer) not in profile.scores:
            raise ValueError(
                f"{layer} at noise level {level} isn't in the profile; profile it first"
            )
        errors = profile.standard_error(level, layer)
        if not candidate < errors.shape[1]:
            raise ValueError(
                f"the profile has {errors.shape[1]} candidates, got number {candidate}"
            )
        known = together.get((level, layer), 0.0)
        together[level, layer] = known + importance * errors[head, candidate].item()
    return math.sqrt(sum(error**2 for error in together.values()))
