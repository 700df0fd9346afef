"""`search`: profile, measure cost, solve, verify; returns a plan."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..generation import Case, GenerationSettings
from ..integrations.diffusers import components
from ..plan import Plan
from ..version import VERSION
from .assemble import first_plan
from .cost import CostTable, break_even_tokens, measure_cost
from .profile import Profile, profile_pipeline
from .sensitivity import reduced, sensitivity
from .solve import (
    Choice,
    Problem,
    at_price,
    cheapest,
    evaluate,
    least_damage,
    problem,
    stages_of,
)
from .verify import Reference, Verified, dense_reference, verify

Report = Callable[[str], None]

MARGIN_DB = 1.5  # aimed at above the wanted PSNR, as prompts differ
# White noise of the same size moves the video less than a sparse pattern's error does, which is the same
# at every step: first guess of the ratio, seen on the embedded model; corrected by each verified run.
NOISE_TO_PATTERN = 10.0
RELAX_DB = 3.0  # further above than this, another round is spent on speed
MAX_ROUNDS = 4


@dataclass(frozen=True)
class Objective:
    """What is asked for; exactly one is set.

    Args:
        target_speedup: Forecast speed-up of the whole generation, with the least damage.
        max_error: Largest root-mean-square relative error of head outputs (weighted by how much they
            matter), as fast as possible.
        min_psnr: Least PSNR in dB against the dense video on held-out cases, as fast as possible.
    """

    target_speedup: float | None = None
    max_error: float | None = None
    min_psnr: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            raise ValueError(
                f"give one of target_speedup, max_error and min_psnr, got {sorted(given) or 'none'}"
            )
        ((name, value),) = given.items()
        low = {"target_speedup": 1.0, "max_error": 0.0, "min_psnr": 0.0}[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > low:
            raise ValueError(f"{name} must be a number above {low:g}, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value!r}")


@dataclass(frozen=True, eq=False)
class Searched:
    """A plan with all that it was found from.

    Args:
        plan: The plan.
        profile: What was measured of the heads.
        problem: Damage and cost of every choice.
        choice: The one taken.
        references: Dense generations of the held-out cases.
        seconds: By phase, and `"total"`.
    """

    plan: Plan
    profile: Profile
    problem: Problem
    choice: Choice
    references: list[Reference]
    seconds: dict[str, float]


def search(pipe: Any, prompts: Sequence[str | Case], **options: Any) -> Plan:
    """Find a plan for a pipeline; see `search_plan` for the options and errors."""
    return search_plan(pipe, prompts, **options).plan


def search_plan(
    pipe: Any,
    prompts: Sequence[str | Case],
    *,
    settings: GenerationSettings,
    held_out: Sequence[str | Case] | None = None,
    target_speedup: float | None = None,
    max_error: float | None = None,
    min_psnr: float | None = None,
    profile: str | Path | None = None,
    profile_steps: int | None = None,
    rows: int = 96,
    max_generations: float = 3.0,
    backend: str = "auto",
    report: Report | None = None,
) -> Searched:
    """Profile a pipeline's heads on prompts and choose a pattern for each.

    Args:
        pipe: A diffusers pipeline of a supported class, not patched.
        prompts: Calibration prompts (or cases with seeds).
        settings: Size, steps and guidance that the plan is made at; it holds for others too.
        held_out: Prompts for verification, none of them in `prompts`. If None, the last of several
            prompts is held out.
        target_speedup, max_error, min_psnr: The dial; give one. See `Objective`.
        profile: File to keep the profile in; a run that was stopped goes on from it.
        profile_steps: Denoising steps of the profiling runs; a third of `settings.steps`, at least 4,
            if None. They are the noise levels that the plan distinguishes.
        rows: Sampled query rows for each head, layer, step and prompt.
        max_generations: With `min_psnr`: stop tightening when the search has taken the time of this
            many dense generations and the PSNR is reached.
        backend: Sparse backend to measure and verify with.
        report: Called with a line of text at each phase.

    Raises:
        ValueError: For an empty prompt list, a prompt in both lists, or an objective out of range.
    """
    say = report or (lambda text: None)
    objective = Objective(target_speedup, max_error, min_psnr)
    calibration, held = _split(_cases(prompts), None if held_out is None else _cases(held_out))
    if len(components(pipe)) != 1:
        raise NotImplementedError(
            "searching a pipeline with two transformers comes later; pass one"
        )
    clock = _Clock()
    steps = profile_steps or max(4, settings.steps // 3)
    say(f"profiling {len(calibration)} prompts at {steps} noise levels")
    profiled = profile_pipeline(
        pipe,
        calibration,
        replace(settings, steps=steps),
        rows=rows,
        path=profile,
        report=lambda done, total, text: say(f"profile {done}/{total} {text}"),
    )
    clock.lap("profile")
    ((name, part),) = profiled.components.items()
    if not part.scores:
        raise ValueError("no self-attention layer could be recorded; is the model supported?")
    module = components(pipe)[name]
    say("measuring cost on this device")
    table = measure_cost(
        part.layout,
        part.num_heads,
        part.head_dim,
        device=module.device,
        dtype=module.dtype,
        backend=backend,
    )
    clock.lap("cost")
    stages = stages_of(part.sigmas)
    say("measuring how much each noise level matters")
    weights = sensitivity(pipe, name, stages, calibration[0], reduced(settings))
    clock.lap("sensitivity")
    say(f"dense references of {len(held)} held-out cases")
    references = [dense_reference(pipe, case, settings) for case in held]
    clock.lap("references")
    dense_seconds = sum(r.seconds for r in references) / len(references)
    calls = references[0].calls(name, stages)
    solved = problem(part, stages, weights, table, calls, dense_seconds)
    clock.lap("solve")
    session = _Session(pipe, name, solved, table, profiled, objective, settings, backend, calls)
    choice, plan, verified = _tune(session, references, max_generations * dense_seconds, clock, say)
    clock.lap("verify")
    plan = _finish(session, plan, choice, verified, clock, calibration, held, weights)
    return Searched(plan, profiled, solved, choice, references, clock.laps)


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {"total": 0.0}
        self._start = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now
        self.laps["total"] = now - self._start

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._start


@dataclass(frozen=True, eq=False)
class _Session:
    """What stays the same while a choice is tuned."""

    pipe: Any
    component: str
    problem: Problem
    table: CostTable
    profile: Profile
    objective: Objective
    settings: GenerationSettings
    backend: str
    calls: list[int]


def _tune(
    session: _Session, references: list[Reference], budget: float, clock: _Clock, say: Report
) -> tuple[Choice, Plan, Verified]:
    """Solve, generate with the plan, and for `min_psnr` correct the forecast by what came out."""
    wanted = session.objective.min_psnr
    scale = NOISE_TO_PATTERN  # measured over forecast damage
    best: tuple[Choice, Plan, Verified] | None = None
    floor = 0.0
    for number in range(MAX_ROUNDS):
        choice = _solve(session, scale, wanted and max(wanted + MARGIN_DB, floor))
        plan = _plan(session, choice)
        if choice.seconds >= session.problem.dense_seconds * 0.999:
            say("no sparse choice is faster than dense here: the plan is all dense")
        verified = verify(session.pipe, plan, references, session.settings, session.backend)
        say(
            f"round {number + 1}: density {choice.density:.3f}, forecast {choice.speedup:.2f}x, "
            f"measured {verified.speedup:.2f}x at {verified.psnr_db:.1f} dB"
        )
        if wanted is None:
            return choice, plan, verified
        good = verified.psnr_db >= wanted
        if good and (best is None or choice.seconds < best[0].seconds):
            best = (choice, plan, verified)
        last = (choice, plan, verified)
        scale = verified.mse / max(choice.damage, 1e-12)
        if choice.damage == 0:
            break
        spent = clock.elapsed + verified.sparse_seconds > budget
        if best and (spent or verified.psnr_db <= wanted + RELAX_DB):
            break
        if not good:  # aim higher than last time
            floor = max(floor, wanted + MARGIN_DB * (number + 2) / 2)
    return best or last


def _solve(session: _Session, scale: float, psnr: float | None) -> Choice:
    objective, task = session.objective, session.problem
    if objective.target_speedup is not None:
        choice = least_damage(task, objective.target_speedup)
        if choice is None:
            fastest = at_price(task, 0.0)
            raise ValueError(
                f"target_speedup {objective.target_speedup:g} is out of reach on this device: the "
                f"fastest plan forecasts {fastest.speedup:.2f}x"
            )
        return choice
    if objective.max_error is not None:
        return cheapest(task, lambda c: c.error <= objective.max_error)
    limit = 10 ** (-psnr / 10) / scale
    return cheapest(task, lambda c: c.damage <= limit)


def _plan(session: _Session, choice: Choice) -> Plan:
    part, total = session.profile.components[session.component], max(1, sum(session.calls))
    plan = first_plan(
        type(session.pipe).__name__, session.component, part, session.problem, choice, session.table
    )
    shares = {session.component: [calls / total for calls in session.calls]}
    return replace(plan, provenance={"stage_shares": shares})


def _finish(
    session: _Session,
    plan: Plan,
    choice: Choice,
    verified: Verified,
    clock: _Clock,
    calibration: list[Case],
    held: list[Case],
    weights: Sequence[float],
) -> Plan:
    """Break-even length, provenance and what was measured."""
    component = plan.components[session.component]
    part = session.profile.components[session.component]
    sparse = choice.density < 0.999
    typical = session.problem.density.gather(1, choice.pick[:, None])[:, 0]
    typical = typical[typical < 0.999].mean().item() if sparse else 1.0
    tokens = 0
    if sparse and session.table.device == "cpu":
        tokens = break_even_tokens(
            session.table, typical, part.num_heads, part.head_dim, session.backend
        )
    clock.lap("break-even")
    wanted = session.objective.min_psnr
    return replace(
        plan,
        components={session.component: replace(component, valid_tokens=(tokens, None))},
        provenance={**plan.provenance, **_provenance(session, calibration, held, weights, clock)},
        measured={
            "psnr_db": round(verified.psnr_db, 3),
            "speedup": round(verified.speedup, 4),
            "held_out_cases": len(held),
            "met": wanted is None or verified.psnr_db >= wanted,
        },
    )


def _provenance(
    session: _Session,
    calibration: list[Case],
    held: list[Case],
    weights: Sequence[float],
    clock: _Clock,
) -> dict[str, Any]:
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")
    }
    cases = {"calibration": calibration, "held_out": held}
    return {
        "sparse_dit": VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "device": session.table.device,
        "machine": platform.machine(),
        "threads": session.table.threads,
        "backend": session.backend,
        "objective": {k: v for k, v in vars(session.objective).items() if v is not None},
        "settings": session.settings.to_dict(),
        "cases": {k: [{"prompt": c.prompt, "seed": c.seed} for c in v] for k, v in cases.items()},
        "profile_steps": session.profile.settings.steps,
        "profile_rows": session.profile.rows,
        "sensitivity": [round(w, 8) for w in weights],
        "search_seconds": {k: round(v, 3) for k, v in clock.laps.items()},
    }


def _cases(prompts: Sequence[str | Case]) -> list[Case]:
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list of texts, got one text; put it in a list")
    return [p if isinstance(p, Case) else Case(p, seed) for seed, p in enumerate(prompts)]


def _split(cases: list[Case], held: list[Case] | None) -> tuple[list[Case], list[Case]]:
    if not cases:
        raise ValueError("searching needs at least one prompt, got none")
    if held is None:
        if len(cases) < 2:
            raise ValueError(
                "give held_out prompts, or two or more prompts, so that one is held out"
            )
        cases, held = cases[:-1], cases[-1:]
    if not held:
        raise ValueError("held_out must hold at least one prompt, got none")
    if shared := sorted({c.prompt for c in cases} & {c.prompt for c in held}):
        raise ValueError(
            f"held-out prompts must not be calibration prompts, got both: {shared[:3]}"
        )
    return cases, held


__all__ = ["Objective", "Searched", "evaluate", "search", "search_plan"]
