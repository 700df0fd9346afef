"""`search`: profile, measure cost, solve, verify; returns a plan."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec

from ..generation import Case, GenerationSettings
from ..integrations import Workload, components, workload
from ..on_cpu import on_cpu
from ..plan import Plan, Stage
from ..plan.evidence import without_evidence
from ..words import option
from .asked import TuneOn, check_search, profiled_at, split_cases
from .assemble import forecast_of, layers_of, levels_of, stage_shares
from .cost import break_even_tokens
from .front import Front, front_of, model_hash
from .objective import PSNR, Objective
from .pricing import TargetDevice, cost_tables, dense_generation, inside
from .profile import ComponentProfile, Profile
from .profiling import profile_pipeline
from .provenance import evidence, measured_of, provenance
from .sensitivity import Sensitivity, sensitivity
from .solve import Choice, Problem, joined, pair_shares, problem, stages_of
from .tune import Clock, Report, Session, tune
from .verify import Reference, dense_reference

Params = ParamSpec("Params")


@dataclass(frozen=True, eq=False)
class Searched:
    """A plan with all that it was found from.

    Args:
        plan: The plan that was found.
        profile: The measured statistics and errors of all heads.
        problem: The units, with what each of their candidates costs and spoils.
        choice: The candidate of each unit that the plan takes.
        references: The dense generations that the plan was tuned and verified with.
        seconds: What each phase of the search took, by name, and `"total"`.
    """

    plan: Plan
    profile: Profile
    problem: Problem
    choice: Choice
    references: list[Reference]
    seconds: dict[str, float]

    @functools.cached_property
    def front(self) -> Front:
        """Other points of the same problem, with the PSNR that the verified plan lets expect."""
        model = model_hash(self.plan.components)
        return front_of(self.problem, model, self.choice, self.plan.measured.get("psnr_db"))


def plan_of(searched: Searched, choice: Choice) -> Plan:
    """Any choice of a search's problem as a plan, for the same model at the same size.

    What the search measured of its own plan (quality, speed-up) doesn't hold for it and is left out.

    Args:
        searched: The result of `search_plan`.
        choice: The candidate of each unit of `searched.problem`, as `solve` gives it.
    """
    plan, task = searched.plan, searched.problem
    components = {
        name: replace(
            plan.components[name],
            stages=levels_of(task, name),
            layers=layers_of(name, part, task, choice),
        )
        for name, part in searched.profile.components.items()
    }
    known = {**without_evidence(plan.provenance), "stage_shares": stage_shares(task)}
    return replace(
        plan,
        components=components,
        density=round(choice.density, 6),
        provenance={**known, "objective": {}},
        forecast=forecast_of(task, choice),
        measured={},
    )


@on_cpu
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
    tune_on: TuneOn = "held_out",
    rows: int = 64,
    max_generations: float = 3.0,
    backend: str = "auto",
    device_table: str | Path | None = None,
    dense_seconds: float | None = None,
    report: Report | None = None,
) -> Searched:
    """Profile a pipeline's heads on prompts and choose a pattern for each.

    The pipeline is left as it was, whatever happens.

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
        tune_on: `"calibration"` tunes and verifies on the last of `prompts`, whose dense generation is
            recorded while it is profiled, so that none is made for verification alone. Nothing is held
            out then: verify the plan afterwards.
        rows: Sampled query rows for each head, layer, step and prompt.
        max_generations: With `min_psnr`: stop tightening when the search has taken the time of this
            many dense generations and the PSNR is reached.
        backend: Sparse backend to measure and verify with.
        device_table: Table of another device to solve for, by name or path; see `DeviceTable`. What is
            verified here is then the quality, not the speed-up.
        dense_seconds: The seconds of a dense generation on that device; measured if the table is of this one.
        report: Called with a line of text at each phase.

    Raises:
        ValueError: For an empty prompt list, a prompt in both lists, a number out of range, a
            patched pipeline, a speed-up out of reach, a profile of something else, a transformer that
            no profiling step runs, a size that the pipeline can't make, or one that gives NaN.
        OSError: If `profile` can't be written.
        TypeError: If `pipe` is no pipeline, or `prompts` no list.
        NotImplementedError: For a pipeline of an unsupported class.
    """
    say = report or (lambda text: None)
    objective = Objective(target_speedup, max_error, min_psnr)
    work = workload(pipe, settings)
    if min_psnr is not None and work.quality != PSNR:
        raise ValueError(
            f"{option('min_psnr')} is for models that make images or videos, and of a "
            f"{type(pipe).__name__} {work.quality} is measured; give another objective"
        )
    target_device = TargetDevice.of(device_table, dense_seconds)
    if target_device is not None and target_device.table.caveat:
        say(target_device.table.caveat)
    calibration, held = split_cases(prompts, held_out, tune_on)
    check_search(
        pipe,
        calibration[0],
        settings,
        rows=rows,
        profile=profile,
        profile_steps=profile_steps,
        target_device=target_device,
    )
    if not (math.isfinite(max_generations) and max_generations > 0):
        raise ValueError(f"max_generations must be a number above 0, got {max_generations!r}")
    clock = Clock(work.device)
    profiled_settings = profiled_at(settings, profile_steps)
    say(f"profiling {len(calibration)} prompts at {profiled_settings.steps} noise levels")
    profiled = profile_pipeline(
        pipe,
        calibration,
        profiled_settings,
        rows=rows,
        reference_steps=None if held else settings.steps,
        path=profile,
        report=lambda done, total, text: say(f"profile {done}/{total} {text}"),
        say=say,
    )
    clock.lap("profile")
    run = _Run(work, calibration, held, backend, clock, say, target_device)
    return _solved(run, profiled, objective, max_generations)


def _for_the_plan(find: Callable[Params, Searched]) -> Callable[Params, Plan]:
    """`find` with the same parameters, less all that the plan was found from."""

    @functools.wraps(find)
    def search(*args: Params.args, **kwargs: Params.kwargs) -> Plan:
        return find(*args, **kwargs).plan

    vars(search)["__signature__"] = inspect.signature(find).replace(return_annotation=Plan)
    search.__name__ = search.__qualname__ = "search"
    search.__annotations__ = {**find.__annotations__, "return": "Plan"}
    return search


search = _for_the_plan(search_plan)


@dataclass(frozen=True, eq=False)
class _Run:
    """What a search was asked to do, less its objective."""

    work: Workload
    calibration: list[Case]
    held_out: list[Case]
    backend: str
    clock: Clock
    say: Report
    target_device: TargetDevice | None = None


def _solved(run: _Run, profiled: Profile, objective: Objective, max_generations: float) -> Searched:
    """Everything after the profile."""
    clock, say, target_device = run.clock, run.say, run.target_device
    parts = profiled.components
    of_device = (
        f"those of the device table {target_device.table.name}"
        if target_device
        else "measured here"
    )
    say(f"costs are {of_device}")
    tables = cost_tables(components(run.work.model), parts, run.backend, target_device)
    clock.lap("cost")
    stages = {name: stages_of(part.sigmas) for name, part in parts.items()}
    say("measuring how much each noise level and layer matters")
    matters = _sensitivities(run, parts, stages)
    clock.lap("sensitivity")
    references = _references(run, profiled)
    clock.lap("references")
    local_seconds = sum(r.seconds for r in references) / len(references)
    calls = {name: references[0].calls(name, stages[name]) for name in parts}
    if target_device is None:
        tables = inside(tables, parts, calls, references)
    dense_seconds = dense_generation(tables, parts, calls, local_seconds, target_device)
    problems = {
        name: problem(part, stages[name], matters[name], tables[name], calls[name], dense_seconds)
        for name, part in parts.items()
    }
    task = joined(problems, pair_shares(parts, calls), dense_seconds)
    clock.lap("solve")
    session = Session(run.work, matters, task, tables, profiled, objective, run.backend)
    choice, plan, verified = tune(session, references, max_generations * local_seconds, clock, say)
    clock.lap("verify")
    plan = _with_break_even(session, plan, choice, run.target_device)
    clock.lap("break-even")
    backing = evidence(parts, task, choice)
    clock.lap("evidence")
    record = provenance(session, run.calibration, run.held_out, clock.laps)
    record["evidence"] = backing
    plan = replace(
        plan,
        provenance={**plan.provenance, **record},
        measured=measured_of(
            objective, verified, run.work.quality, len(run.held_out), run.target_device
        ),
    )
    return Searched(plan, profiled, task, choice, references, clock.laps)


def _references(run: _Run, profiled: Profile) -> list[Reference]:
    """Dense generations to tune with: of the held-out cases, or the one that profiling made."""
    if not run.held_out:
        assert profiled.reference is not None, "profiling was asked for it"
        return [profiled.reference]
    run.say(f"dense references of {len(run.held_out)} held-out cases")
    return [dense_reference(run.work, case) for case in run.held_out]


def _sensitivities(
    run: _Run, parts: Mapping[str, ComponentProfile], stages: Mapping[str, tuple[Stage, ...]]
) -> dict[str, Sensitivity]:
    """How sensitive the output is to errors of each transformer, by component name."""
    small, case = run.work.reduced(), run.calibration[-1]
    levels = sum(map(len, stages.values()))
    return {
        name: sensitivity(
            small, name, stages[name], part.layers, case, levels=levels, report=run.say
        )
        for name, part in parts.items()
    }


def _with_break_even(
    session: Session, plan: Plan, choice: Choice, target_device: TargetDevice | None
) -> Plan:
    """The plan with the number of tokens under which dense attention is faster, for each transformer."""
    task = session.problem
    picked = task.density.gather(1, choice.pick[:, None])[:, 0]
    found = {}
    for name, component in plan.components.items():
        mine = picked[task.units_of(name)]
        sparse, tokens = mine[mine < 1], 0
        if len(sparse):
            density = sparse.mean().item()
            for (heads, head_dim), table in session.tables[name].items():
                others = target_device.smaller(head_dim, table.dtype) if target_device else None
                here = break_even_tokens(table, density, heads, head_dim, others)
                tokens = max(tokens, here)
        found[name] = replace(component, valid_tokens=(tokens, None))
    return replace(plan, components=found)
