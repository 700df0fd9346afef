"""How a plan was found and what backs its choice, for the plan's own record."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..generation import Case
from ..timing import timing_of
from ..version import VERSION
from .assemble import one_or_named
from .dependence import depends, prompt_dependence
from .exact import certify
from .objective import PSNR
from .options import SearchOptions
from .profile import ComponentProfile
from .solve import Choice, Problem
from .tune import Session
from .verify import Reference, Verified

LIBRARIES = ("torch", "diffusers", "transformers")


def provenance(
    session: Session,
    calibration: Sequence[Case],
    held_out: Sequence[Case],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """JSON-ready `provenance` of a plan, less what `Session.plan` wrote.

    Args:
        session: What the search chose from, and by what.
        calibration, held_out: The cases that were profiled, and those that the plan was verified on.
        seconds: What each phase of the search took, by its name.
    """
    cases = {"calibration": calibration, "held_out": held_out}
    tables = [(name, next(iter(costs.values()))) for name, costs in session.tables.items()]
    sensitivity = {
        name: {
            "stages": [float(f"{weight:.6g}") for weight in part.stages],
            "layers": [round(share, 6) for share in part.layers],
        }
        for name, part in session.sensitivity.items()
    }
    return {
        **made_with(*LIBRARIES),
        "device": one_or_named({name: table.device for name, table in tables}),
        "machine": platform.machine(),
        "threads": one_or_named({name: table.threads for name, table in tables}),
        "backend": one_or_named({name: table.backend for name, table in tables}),
        "objective": session.options.objective.to_dict(),
        "settings": session.work.settings.to_dict(),
        "cases": {k: [{"prompt": c.prompt, "seed": c.seed} for c in v] for k, v in cases.items()},
        "profile_steps": session.profile.settings.steps,
        "profile_rows": session.profile.rows,
        "errors_behind_projection": True,
        "sensitivity": one_or_named(sensitivity),
        "search_seconds": {phase: round(value, 3) for phase, value in seconds.items()},
    }


def schedule(reference: Reference) -> dict[str, Any]:
    """The noise levels of a dense generation's steps, falling, by which a plan is exported to other hosts."""
    levels = {round(sigma, 6) for sigmas in reference.forwards.values() for sigma in sigmas}
    return {"sigmas": sorted(levels, reverse=True)}


def made_with(*libraries: str) -> dict[str, Any]:
    """When a plan was made, and by which versions, for its provenance."""
    return {
        "sparse_dit": VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }


def measured_of(
    options: SearchOptions, verified: Verified, quality: str, cases: int
) -> dict[str, Any]:
    """`measured` of a plan; whether a speed-up is met on another device isn't known here (None).

    Args:
        options: What the search was asked for.
        verified: What the plan gave when it was verified.
        quality: The metric that is noted; see `Workload`.
        cases: Held-out cases among those it was verified on.
    """
    psnr, speedup, target_device = options.min_psnr, options.target_speedup, options.target_device
    foreign = target_device is not None and not target_device.table.here
    met: bool | None = psnr is None or verified.difference[PSNR] >= psnr
    if speedup is not None:
        met = None if foreign else verified.speedup >= speedup
    return {
        quality: round(verified.difference[quality], 3),
        **least_and_most(quality, [case[quality] for case in verified.by_case]),
        "speedup_on_another_device" if foreign else "speedup": round(verified.speedup, 4),
        **timing_of(verified.pairs),
        "held_out_cases": cases,
        "met": met,
    }


def least_and_most(quality: str, values: Sequence[float]) -> dict[str, float]:
    """The least and the greatest value of a metric over cases, for a plan's `measured`; empty for one case.

    Args:
        quality: Name of the metric.
        values: What it is in each case.
    """
    if len(values) < 2:
        return {}
    return {
        f"{quality}_least": round(min(values), 3),
        f"{quality}_most": round(max(values), 3),
    }


CERTIFIED_UNITS = 5000  # larger integer programs take minutes to write down alone
CERTIFY_SECONDS = 5.0


def evidence(
    parts: Mapping[str, ComponentProfile], problem: Problem, choice: Choice
) -> dict[str, Any]:
    """How far off a choice and its forecast may be, and which heads depend on the prompt; JSON-ready.

    `row_error` is one standard error of the forecast loss that comes from sampling rows, relative to it.
    `gap` is the share of the loss that a better choice of the same candidates, as fast, could save at most;
    None if the problem is too large to prove it. `prompt_dependent` lists for each transformer and layer the
    `[stage, head]` whose important tiles or columns depend on the prompt.

    Args:
        parts: The transformers' profiles, by component name.
        problem: The problem that was made of all of them.
        choice: The candidate of each unit of that problem.
    """
    bar = loss_error(parts, problem, choice.pick)
    gap = None
    if len(problem.units) <= CERTIFIED_UNITS:
        gap = certify(problem, choice, time_limit=CERTIFY_SECONDS).gap
    return {
        "row_error": round(bar / choice.loss, 4) if choice.loss > 0 else 0.0,
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


def loss_error(parts: Mapping[str, ComponentProfile], problem: Problem, pick: Tensor) -> float:
    """One standard error of a choice's forecast loss, in the loss's unit, from row sampling alone.

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
