"""Whether a pipeline can be searched as asked; what can be told of it without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from ..generation import Case, GenerationSettings
from ..integrations import unpatched, workload
from ..outputs import check_writable
from ..plan.schema import MAX_STAGES
from ..words import option
from .pricing import TargetDevice
from .profiling import phases_of, profiling_steps, started


def check_search(
    pipe: Any,
    case: Case,
    settings: GenerationSettings,
    *,
    rows: int = 64,
    profile: str | Path | None = None,
    profile_steps: int | None = None,
    target_device: TargetDevice | None = None,
) -> None:
    """Raise unless the pipeline can be profiled and searched so.

    Args:
        pipe: A loaded pipeline, or an `outline` of one.
        case: One of the prompts.
        settings, rows, profile, profile_steps: As `search_plan` takes them.
        target_device: The device that is solved for.

    Raises:
        ValueError, TypeError, NotImplementedError, OSError: See `search_plan`.
    """
    for transformer in unpatched(pipe).values():
        if target_device is not None:
            target_device.check(transformer)
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(f"{option('rows')} must be a whole number >= 1, got {rows!r}")
    profiled_at(settings, profile_steps)
    workload(pipe, settings).check(case)
    if profile is not None:
        check_writable(Path(profile), option("profile"))


def profiled_at(settings: GenerationSettings, profile_steps: int | None) -> GenerationSettings:
    """Settings of the profiling runs of a search.

    Raises:
        ValueError: If the number of steps is out of range.
    """
    name, steps = option("profile_steps"), profile_steps
    if steps is None:
        steps = profiling_steps(settings.steps)
    elif isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {steps!r}")
    if steps > MAX_STAGES:  # the plan couldn't be written in the end
        raise ValueError(
            f"{name} must be at most {MAX_STAGES}, the noise levels that a plan can tell apart, got {steps}"
        )
    return replace(settings, steps=steps)


def check_profile(
    pipe: Any,
    cases: Sequence[Case],
    settings: GenerationSettings,
    path: Path,
    *,
    rows: int = 64,
    reference_steps: int | None = None,
) -> None:
    """Raise unless the profile at `path`, if there is one, can be gone on with.

    Args:
        pipe: A loaded pipeline, or an `outline` of one.
        cases, settings, path, rows, reference_steps: As `profile_pipeline` takes them.

    Raises:
        ValueError: If it is of something else, or damaged.
    """
    if path.exists():
        phases = phases_of(cases, reference_steps, beyond=workload(pipe, settings).has_larger)
        started(pipe, settings, rows, phases, path)


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
