"""How a plan was found, for the plan's own record."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

from ..generation import Case
from ..timing import timing_of
from ..version import VERSION
from .joint import one_or_named
from .objective import PSNR, Objective
from .target_device import TargetDevice
from .tune import Session
from .verify import Verified

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
        "sparse_dit": VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "device": one_or_named({name: table.device for name, table in tables}),
        "machine": platform.machine(),
        "threads": one_or_named({name: table.threads for name, table in tables}),
        "backend": one_or_named({name: table.backend for name, table in tables}),
        "objective": session.objective.to_dict(),
        "settings": session.work.settings.to_dict(),
        "cases": {k: [{"prompt": c.prompt, "seed": c.seed} for c in v] for k, v in cases.items()},
        "profile_steps": session.profile.settings.steps,
        "profile_rows": session.profile.rows,
        "errors_behind_projection": True,
        "sensitivity": one_or_named(sensitivity),
        "search_seconds": {phase: round(value, 3) for phase, value in seconds.items()},
    }


def measured_of(
    objective: Objective,
    verified: Verified,
    quality: str,
    cases: int,
    target_device: TargetDevice | None,
) -> dict[str, Any]:
    """`measured` of a plan; whether a speed-up is met on another device isn't known here (None).

    Args:
        objective: The speed-up, error or PSNR that was asked for.
        verified: What the plan gave when it was verified.
        quality: The metric that is noted; see `Workload`.
        cases: Held-out cases among those it was verified on.
        target_device: The device that was solved for, if it isn't this one.
    """
    psnr, speedup = objective.min_psnr, objective.target_speedup
    foreign = target_device is not None and not target_device.table.here
    met: bool | None = psnr is None or verified.difference[PSNR] >= psnr
    if speedup is not None:
        met = None if foreign else verified.speedup >= speedup
    return {
        quality: round(verified.difference[quality], 3),
        "speedup_on_another_device" if foreign else "speedup": round(verified.speedup, 4),
        **timing_of(verified.pairs),
        "held_out_cases": cases,
        "met": met,
    }
