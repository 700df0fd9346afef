"""Whether a pipeline can be searched as asked; what can be told of it without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..generation import Case, GenerationSettings
from ..integrations import unpatched, workload
from ..outputs import check_writable
from ..plan.schema import MAX_STAGES
from ..words import option
from .profiling import phases_of, profiling_steps, started
from .target_device import TargetDevice


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
