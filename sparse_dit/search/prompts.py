"""Which prompts a search is calibrated with, and which are held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from ..generation import Case
from ..words import option

TuneOn = Literal["held_out", "calibration"]


def split_cases(
    prompts: Sequence[str | Case], held_out: Sequence[str | Case] | None, tune_on: str
) -> tuple[list[Case], list[Case]]:
    """Calibration and held-out cases; none are held out if the plan is tuned on calibration.

    Args:
        prompts, held_out, tune_on: As `search_plan` takes them.

    Raises:
        ValueError: If there are none, one is in both, or `tune_on` is unknown.
        TypeError: If they are no lists.
    """
    cases = _listed("prompts", prompts)
    if tune_on not in get_args(TuneOn):
        raise ValueError(f"tune_on must be one of {get_args(TuneOn)}, got {tune_on!r}")
    if not cases:
        raise ValueError("searching needs at least one prompt, got none")
    if tune_on == "calibration":
        if held_out is not None:
            raise ValueError(
                "tune_on='calibration' takes no held_out prompts; leave them out, and verify on them "
                "afterwards"
            )
        return cases, []
    if held_out is None:
        if len(cases) < 2:
            raise ValueError(
                f"give {option('held_out')} prompts, or two or more prompts, so that one is held out"
            )
        cases, held = cases[:-1], cases[-1:]
    else:
        held = _listed("held_out", held_out)
    if not held:
        raise ValueError(f"{option('held_out')} must hold at least one prompt, got none")
    if shared := sorted({c.prompt for c in cases} & {c.prompt for c in held}):
        if held_out is None:
            raise ValueError(
                f"the last prompt is held out, so it must not be given twice, got {shared[0]!r}; give "
                f"another one, or {option('held_out')} prompts"
            )
        raise ValueError(
            f"held-out prompts must not be calibration prompts, got both: {shared[:3]}"
        )
    return cases, held


def _listed(name: str, prompts: Sequence[str | Case]) -> list[Case]:
    if isinstance(prompts, str | Case) or not isinstance(prompts, Sequence):
        raise TypeError(f"{name} must be a list of texts, got {prompts!r:.60}; put it in a list")
    return [p if isinstance(p, Case) else Case(p, seed) for seed, p in enumerate(prompts)]
