"""What a search is asked for, checked before anything is loaded or run."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, get_args, get_type_hints

from ..generation import Case, GenerationSettings
from ..integrations import unpatched, workload
from ..outputs import check_writable
from ..plan.schema import MAX_STAGES
from ..step_cache import StepCache, asked_caches
from ..words import option
from .caching import check_takes
from .objective import PSNR, Objective
from .pricing import TargetDevice
from .profiling import phases_of, profiling_steps, started

Report = Callable[[str], None]
TuneOn = Literal["held_out", "calibration"]
Prompts = Sequence[str | Case]
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchOptions:
    """What a search is asked for, beside the pipeline and its calibration prompts.

    Args:
        settings: Size, steps and guidance that the plan is made at; it holds for others too.
        held_out: Prompts for verification, none of them in `prompts`. If None, the last of several
            prompts is held out.
        target_speedup, max_error, min_psnr: The dial; give one. See `Objective`.
        profile: File to keep the profile in; a run that was stopped goes on from it.
        profile_steps: Denoising steps of the profiling runs; a third of `settings.steps`, at least 4,
            if None. They are the noise levels that the plan distinguishes.
        tune_on: `"calibration"` tunes and verifies on the last of `prompts`, whose dense generation is
            recorded while it is profiled, so that none is made for verification alone. Nothing is held
            out then: verify the plan afterwards.
        rows: Sampled query rows for each head, layer, step and prompt.
        max_generations: With `min_psnr`: stop tightening when the search has taken the time of this
            many dense generations and the PSNR is reached.
        backend: Sparse backend to measure and verify with.
        device_table: Table of another device to solve for, by name or path; see `DeviceTable`. What is
            verified here is then the quality, not the speed-up.
        cache: A step cache as a part of the pipeline that is searched: `"first-block"` or `"taylorseer"`,
            which the search also sets, or with a number; see `step_cache.asked_caches`. It goes with
            `min_psnr` or `target_speedup`.
        dense_seconds: The seconds of a dense generation on that device; measured if the table is of this one.
        report: Called with a line of text at each phase.

    Raises:
        ValueError: If a number is out of range, no or several dials are set, or the table doesn't fit the
            seconds.
    """

    settings: GenerationSettings
    held_out: Prompts | None = None
    target_speedup: float | None = None
    max_error: float | None = None
    min_psnr: float | None = None
    profile: str | Path | None = None
    profile_steps: int | None = None
    tune_on: TuneOn = "held_out"
    rows: int = 64
    max_generations: float = 3.0
    backend: str = "auto"
    device_table: str | Path | None = None
    dense_seconds: float | None = None
    cache: str | None = None
    report: Report | None = None

    def __post_init__(self) -> None:
        # each raises for what isn't in range
        _ = self.objective, self.target_device, self.profiled, self.caches
        if self.tune_on not in get_args(TuneOn):
            raise ValueError(f"tune_on must be one of {get_args(TuneOn)}, got {self.tune_on!r}")
        rows, most = self.rows, self.max_generations
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ValueError(f"{option('rows')} must be a whole number >= 1, got {rows!r}")
        if not (math.isfinite(most) and most > 0):
            raise ValueError(f"max_generations must be a number above 0, got {most!r}")

    @functools.cached_property
    def objective(self) -> Objective:
        """The speed-up, error or PSNR that is asked for."""
        return Objective(self.target_speedup, self.max_error, self.min_psnr)

    @functools.cached_property
    def target_device(self) -> TargetDevice | None:
        """The device that is solved for by its table; None if costs are measured here."""
        return TargetDevice.of(self.device_table, self.dense_seconds)

    @functools.cached_property
    def profiled(self) -> GenerationSettings:
        """The settings of the profiling runs."""
        return profiled_at(self.settings, self.profile_steps)

    @functools.cached_property
    def caches(self) -> tuple[StepCache, ...]:
        """The step caches that may be searched with, from the most careful to the boldest."""
        if self.cache is None:
            return ()
        if not isinstance(self.cache, str):
            raise TypeError(f"{option('cache')} must be text, got {self.cache!r:.60}")
        if self.max_error is not None:
            raise ValueError(
                f"{option('cache')} goes with {option('min_psnr')} or {option('target_speedup')}: an "
                "error of heads says nothing of a cache"
            )
        return asked_caches(self.cache, self.settings.steps)

    def say(self, text: str) -> None:
        """Report a line of text, if somebody listens."""
        if self.report is not None:
            self.report(text)

    def split(self, prompts: Prompts) -> tuple[list[Case], list[Case]]:
        """Calibration and held-out cases; none are held out if the plan is tuned on calibration.

        Raises:
            ValueError: If there are none, or one is in both.
            TypeError: If they are no lists.
        """
        cases = _listed("prompts", prompts)
        if not cases:
            raise ValueError("searching needs at least one prompt, got none")
        if self.tune_on == "calibration":
            if self.held_out is not None:
                raise ValueError(
                    "tune_on='calibration' takes no held_out prompts; leave them out, and verify on them "
                    "afterwards"
                )
            return cases, []
        if self.held_out is None:
            if len(cases) < 2:
                raise ValueError(
                    f"give {option('held_out')} prompts, or two or more prompts, so that one is held out"
                )
            cases, held = cases[:-1], cases[-1:]
        else:
            held = _listed("held_out", self.held_out)
        if not held:
            raise ValueError(f"{option('held_out')} must hold at least one prompt, got none")
        if shared := sorted({c.prompt for c in cases} & {c.prompt for c in held}):
            if self.held_out is None:
                raise ValueError(
                    f"the last prompt is held out, so it must not be given twice, got {shared[0]!r}; give "
                    f"another one, or {option('held_out')} prompts"
                )
            raise ValueError(
                f"held-out prompts must not be calibration prompts, got both: {shared[:3]}"
            )
        return cases, held

    def check(self, pipe: Any, case: Case) -> None:
        """Raise unless a pipeline can be profiled and searched so; its weights aren't needed.

        Args:
            pipe: A loaded pipeline, or an `outline` of one.
            case: One of the prompts.

        Raises:
            ValueError, TypeError, NotImplementedError, OSError: See `search_plan`.
        """
        work = workload(pipe, self.settings)
        if self.min_psnr is not None and work.quality != PSNR:
            raise ValueError(
                f"{option('min_psnr')} is for models that make images or videos, and of a "
                f"{type(pipe).__name__} {work.quality} is measured; give another objective"
            )
        for transformer in unpatched(pipe).values():
            if self.target_device is not None:
                self.target_device.check(transformer)
        if self.caches:
            check_takes(pipe, self.caches[0])
        work.check(case)
        if self.profile is not None:
            check_writable(Path(self.profile), option("profile"))


def by_keywords(
    options: Callable[P, Any],
) -> Callable[[Callable[[Any, Any, Any], R]], Callable[Concatenate[Any, Sequence[Any], P], R]]:
    """A decorator by which a search takes each field of its options as a keyword.

    Args:
        options: The class of the third argument; its fields are what the decorated function's signature then
            shows.
    """

    def decorate(
        search: Callable[[Any, Any, Any], R],
    ) -> Callable[Concatenate[Any, Sequence[Any], P], R]:
        @functools.wraps(search)
        def taking(pipe: Any, prompts: Sequence[Any], *args: P.args, **kwargs: P.kwargs) -> R:
            return search(pipe, prompts, options(*args, **kwargs))

        hints = {**get_type_hints(options), **get_type_hints(search)}
        *own, _ = inspect.signature(search).parameters.values()
        shown = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in (*own, *inspect.signature(options).parameters.values())
        ]
        vars(taking)["__signature__"] = inspect.Signature(shown, return_annotation=hints["return"])
        taking.__annotations__ = {
            name: hints[name] for name in [*(p.name for p in shown), "return"]
        }
        return taking

    return decorate


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


def _listed(name: str, prompts: Sequence[str | Case]) -> list[Case]:
    if isinstance(prompts, str | Case) or not isinstance(prompts, Sequence):
        raise TypeError(f"{name} must be a list of texts, got {prompts!r:.60}; put it in a list")
    return [p if isinstance(p, Case) else Case(p, seed) for seed, p in enumerate(prompts)]
