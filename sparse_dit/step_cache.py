"""Step caches: which of the host library's own a plan was searched with, and how it is set.

A step cache takes what most of a transformer gave at an earlier step again. `first-block` does so where the
first block's output has hardly changed since (FirstBlockCache of diffusers, from ParaAttention); `taylorseer`
at every step but each INTERVAL-th, by a line through the last two outputs that were computed (TaylorSeer,
arXiv 2503.06923). The cache itself is the library's; here are its name, its settings, and their text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .plan import Plan, PlanError

FIRST_BLOCK, TAYLORSEER = "first-block", "taylorseer"
NAMED = "step_cache"  # the entry of a plan's provenance
LEAST_FIRST = 2  # steps that taylorseer needs for a line


@dataclass(frozen=True)
class StepCache:
    """A step cache with its settings.

    Args:
        name: `"first-block"` or `"taylorseer"`.
        settings: `{"threshold": t}`: the relative change of the first block's residual up to which a step
            is taken again; or `{"interval": n, "first": m}`: of the steps after the first m every n-th is
            computed.

    Raises:
        ValueError: If there is no such cache, or a setting is missing or out of range.
    """

    name: str
    settings: Mapping[str, float]

    def __post_init__(self) -> None:
        if self.name not in _SETTINGS:
            raise ValueError(f"a step cache must be one of {sorted(_SETTINGS)}, got {self.name!r}")
        checks, got = _SETTINGS[self.name], dict(self.settings)
        if set(got) != set(checks):
            raise ValueError(f"{self.name} must have the settings {sorted(checks)}, got {got}")
        for setting, (holds, what) in checks.items():
            value = got[setting]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not holds(value):
                raise ValueError(
                    f"{setting} of the step cache {self.name} must be {what}, got {value!r}"
                )

    def __str__(self) -> str:
        return f"{self.name}={':'.join(f'{value:g}' for value in self.settings.values())}"

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"name": self.name, **self.settings}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> StepCache:
        """Inverse of `to_dict`; ValueError if it is none."""
        settings = {key: value for key, value in data.items() if key != "name"}
        return StepCache(str(data.get("name")), settings)

    @staticmethod
    def of(plan: Plan | None) -> StepCache | None:
        """The step cache that a plan was searched with.

        Raises:
            PlanError: If the plan names one that isn't known.
        """
        found = None if plan is None else plan.provenance.get(NAMED)
        if found is None:
            return None
        try:
            return StepCache.from_dict(found)
        except (AttributeError, ValueError) as error:
            raise PlanError(f"provenance.{NAMED}: {error}; search again, or take it out") from None


def compared_rows(plan: Plan) -> list[dict[str, Any]]:
    """What a plan's search measured of sparse attention and step caches, each alone and both."""
    rows = plan.provenance.get("compared")
    wanted = {"what": str, "density": float, "computed": float, "speedup": float}
    return [
        row
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict)
        and "cache" in row
        and all(isinstance(row.get(key), kind) for key, kind in wanted.items())
    ]


def cache_notes(
    plan: Plan, enabled: Mapping[str, StepCache | str | None], steps: int | None
) -> list[str]:
    """What a patched model's step caches have to do with its plan, in words; nothing of a plan without one.

    Args:
        plan: The plan.
        enabled: For each component the one that is enabled; of one that isn't known here what it is called.
        steps: Steps of the last generation; None if that isn't known.
    """
    planned = StepCache.of(plan)
    if planned is None:
        return []
    notes = []
    for name, found in enabled.items():
        if found == planned:
            notes.append(f"{name}: step cache {planned}, as in the search")
            continue
        instead = "none" if found is None else f"{found}"
        notes.append(
            f"{name}: the plan was searched with the step cache {planned}, and {instead} is enabled, so its "
            "forecast doesn't hold; patch with step_cache=True and no other enabled"
        )
    settings = plan.provenance.get("settings")
    set_for = settings.get("steps") if isinstance(settings, dict) else None
    if planned in enabled.values() and steps and set_for and steps != set_for:
        notes.append(
            f"the step cache was set for {set_for} steps, and {steps} ran: the PSNR and the "
            "speed-up aren't known there; search with as many"
        )
    return notes


_SETTINGS: dict[str, dict[str, tuple[Callable[[float], bool], str]]] = {
    FIRST_BLOCK: {"threshold": (lambda x: x > 0, "a finite number above 0")},
    TAYLORSEER: {
        "interval": (lambda x: x >= 2 and x == int(x), "a whole number >= 2"),
        "first": (
            lambda x: x >= LEAST_FIRST and x == int(x),
            f"a whole number >= {LEAST_FIRST}",
        ),
    },
}
# what a search may set, from the most careful on
THRESHOLDS = (0.03, 0.05, 0.08, 0.12, 0.16, 0.2, 0.27, 0.35)
INTERVALS = (2, 3, 4, 6, 8)


def asked_caches(text: str, steps: int) -> tuple[StepCache, ...]:
    """The step caches that a text asks for, from the most careful to the boldest.

    `"first-block"` and `"taylorseer"` ask for any setting, `"first-block=0.12"` for one threshold,
    `"taylorseer=2"` for one interval, `"taylorseer=2:3"` for the steps before it too.

    Args:
        text: See above.
        steps: Denoising steps of a generation.

    Raises:
        ValueError: If the text asks for none of them, or for one that leaves out none of the steps.
    """
    name, equals, value = text.partition("=")
    if name not in _SETTINGS:
        raise ValueError(
            f"a step cache must be one of {', '.join(sorted(_SETTINGS))}, or one with a number "
            f"({FIRST_BLOCK}=0.12, {TAYLORSEER}=2), got {text!r}"
        )
    first = max(LEAST_FIRST, steps // 4)
    if not equals and name == FIRST_BLOCK:
        return tuple(StepCache(name, {"threshold": one}) for one in THRESHOLDS)
    if not equals:
        pairs = [(2, steps // 2), (2, steps // 3), *((n, first) for n in INTERVALS)]
        found: dict[tuple[int, ...], StepCache] = {}
        for interval, wanted in pairs:
            m = _first(interval, max(LEAST_FIRST, wanted), steps)
            cache = _leaving_out(StepCache(name, {"interval": interval, "first": m}), steps)
            found.setdefault(_computed(interval, m, steps), cache)
        return tuple(found.values())
    try:
        numbers = [float(part) for part in value.split(":")]
    except ValueError:
        numbers = []
    numbers = [int(one) if one.is_integer() else one for one in numbers]
    names = tuple(_SETTINGS[name])
    if name == TAYLORSEER and len(numbers) == 1:
        numbers.append(_first(numbers[0], first, steps))
    if len(numbers) != len(names):
        raise ValueError(f"{text!r} must be {name}={':'.join(map(str.upper, names))}, in numbers")
    return (_leaving_out(StepCache(name, dict(zip(names, numbers, strict=True))), steps),)


def _leaving_out(cache: StepCache, steps: int) -> StepCache:
    """The same; ValueError if its numbers alone say that it computes every step."""
    first = cache.settings.get("first", 0)
    if first >= steps:  # the step after the first ones is always left out
        raise ValueError(
            f"the step cache {cache} leaves out none of {steps} steps: the first {first:g} are computed; "
            f"give more steps, or {cache.name}=INTERVAL:FIRST with {LEAST_FIRST} <= FIRST < steps"
        )
    return cache


def _computed(interval: int, first: int, steps: int) -> tuple[int, ...]:
    """Which steps TaylorSeer computes: the first ones, the second after these, and each `interval`-th then.

    In a few steps several intervals come to the same.
    """
    return tuple(
        step for step in range(steps) if step < first or (step - first - 1) % interval == 0
    )


def _first(interval: float, first: int, steps: int) -> int:
    """So many first steps, or one more where otherwise the last step would be computed.

    Nothing follows that one, so what it lacks costs least: at equal shares of calls this is worth 5 dB and
    more at 12 steps.
    """
    return first + (interval > 0 and (steps - first - 2) % interval == 0)
