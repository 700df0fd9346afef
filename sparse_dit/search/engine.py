"""`search`: profile, measure cost, solve, verify; returns a plan."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..generation import Case
from ..integrations import Workload, components, workload
from ..on_cpu import on_cpu
from ..plan import Plan, Stage
from ..plan.evidence import without_evidence
from .assemble import forecast_of, layers_of, levels_of, stage_shares
from .cost import Costs, break_even_tokens
from .front import Front, front_of, model_hash
from .objective import PSNR
from .options import SearchOptions, by_keywords
from .pricing import TargetDevice, cost_tables, dense_generation, inside
from .profile import ComponentProfile, Profile
from .profiling import profile_pipeline
from .provenance import evidence, measured_of, provenance, schedule
from .repeat import repeated
from .sensitivity import Sensitivity, sensitivity
from .solve import Choice, Problem, stages_of, whole_problem
from .together import together, tuned_alone
from .tune import Clock, Session
from .verify import Reference, dense_reference


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
        cached_psnr_db: The PSNR that the plan's step cache gives alone; None without one.
    """

    plan: Plan
    profile: Profile
    problem: Problem
    choice: Choice
    references: list[Reference]
    seconds: dict[str, float]
    cached_psnr_db: float | None = None

    @functools.cached_property
    def front(self) -> Front:
        """Other points of the same problem, with the PSNR that the verified plan lets expect."""
        model = model_hash(self.plan.components)
        psnr_db = self.plan.measured.get("psnr_db")
        return front_of(
            self.problem, model, self.choice, psnr_db=psnr_db, cached_psnr_db=self.cached_psnr_db
        )


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
            layers=layers_of(name, part.layers, task, choice),
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


@by_keywords(SearchOptions)
def search_plan(pipe: Any, prompts: Sequence[str | Case], options: SearchOptions) -> Searched:
    """Profile a pipeline's heads on prompts and choose a pattern for each.

    The pipeline is left as it was, whatever happens.

    Args:
        pipe: A diffusers pipeline of a supported class, not patched.
        prompts: Calibration prompts (or cases with seeds).
        options: What is asked for: each field of `SearchOptions` is a keyword.

    Raises:
        ValueError: For an empty prompt list, a prompt in both lists, a number out of range, a
            patched pipeline, a speed-up out of reach, a profile of something else, a transformer that
            no profiling step runs, a size that the pipeline can't make, or one that gives NaN.
        OSError: If `profile` can't be written.
        TypeError: If `pipe` is no pipeline, or `prompts` no list.
        NotImplementedError: For a pipeline of an unsupported class.
    """
    return _searched(pipe, prompts, options)


@by_keywords(SearchOptions)
def search(pipe: Any, prompts: Sequence[str | Case], options: SearchOptions) -> Plan:
    """The plan of `search_plan`, without all that it was found from."""
    return _searched(pipe, prompts, options).plan


@on_cpu
def _searched(pipe: Any, prompts: Sequence[str | Case], options: SearchOptions) -> Searched:
    work, say = workload(pipe, options.settings), options.say
    calibration, held = options.split(prompts)
    if options.target_device is not None and options.target_device.table.caveat:
        say(options.target_device.table.caveat)
    options.check(pipe, calibration[0])
    for cache in options.caches[:1]:  # before hours are spent
        say(f"trying the step cache {cache.name}")
        dense_reference(work.reduced().with_steps(2), calibration[0], cache=cache)
    clock = Clock(work.device)
    say(f"profiling {len(calibration)} prompts at {options.profiled.steps} noise levels")
    profiled = profile_pipeline(
        pipe,
        calibration,
        options.profiled,
        rows=options.rows,
        reference_steps=None if held else options.settings.steps,
        path=options.profile,
        report=lambda done, total, text: say(f"profile {done}/{total} {text}"),
        say=say,
    )
    clock.lap("profile")
    return _solved(_Run(options, work, calibration, held, clock), profiled)


@dataclass(frozen=True, eq=False)
class _Run:
    """A search that is under way: what it was asked for, of which pipeline and cases."""

    options: SearchOptions
    work: Workload
    calibration: list[Case]
    held_out: list[Case]
    clock: Clock


def _solved(run: _Run, profiled: Profile) -> Searched:
    """Everything after the profile."""
    options, clock, say = run.options, run.clock, run.options.say
    target_device = options.target_device
    parts = profiled.components
    of_device = (
        f"those of the device table {target_device.table.name}"
        if target_device
        else "measured here"
    )
    say(f"costs are {of_device}")
    tables = cost_tables(components(run.work.model), parts, options.backend, target_device)
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
    task = whole_problem(parts, matters, tables, calls, dense_seconds)
    clock.lap("solve")
    session = Session(options, run.work, matters, task, tables, profiled)
    budget = options.max_generations * local_seconds
    alone, compared = tuned_alone(session, references, budget, clock), None
    if options.caches:
        best, compared = together(session, references, alone, budget, clock)
    else:
        assert alone is not None, "it is None only where a cache may help"
        best = alone
    session, choice, plan, verified = best
    task = session.problem
    clock.lap("verify")
    plan = with_break_even(plan, task, choice, tables, target_device)
    clock.lap("break-even")
    backing = evidence(parts, task, choice)
    backing["repeated"] = repeated(parts, tables, calls, task, choice.loss)
    clock.lap("evidence")
    record = provenance(session, run.calibration, run.held_out, clock.laps)
    record["evidence"] = backing
    record["schedule"] = schedule(references[0])
    if compared is not None:
        record["compared"] = compared
    plan = replace(
        plan,
        provenance={**plan.provenance, **record},
        measured=measured_of(options, verified, run.work.quality, len(run.held_out)),
    )
    cached = session.cached
    cached_psnr_db = None if cached is None else cached.difference[PSNR]
    return Searched(plan, profiled, task, choice, references, clock.laps, cached_psnr_db)


def _references(run: _Run, profiled: Profile) -> list[Reference]:
    """Dense generations to tune with: of the held-out cases, or the one that profiling made."""
    if not run.held_out:
        assert profiled.reference is not None, "profiling was asked for it"
        return [profiled.reference]
    run.options.say(f"dense references of {len(run.held_out)} held-out cases")
    return [dense_reference(run.work, case) for case in run.held_out]


def _sensitivities(
    run: _Run, parts: Mapping[str, ComponentProfile], stages: Mapping[str, tuple[Stage, ...]]
) -> dict[str, Sensitivity]:
    """How sensitive the output is to errors of each transformer, by component name."""
    small, case = run.work.reduced(), run.calibration[-1]
    levels = sum(map(len, stages.values()))
    return {
        name: sensitivity(
            small, name, stages[name], part.layers, case, levels=levels, report=run.options.say
        )
        for name, part in parts.items()
    }


def with_break_even(
    plan: Plan,
    task: Problem,
    choice: Choice,
    tables: Mapping[str, Costs],
    target_device: TargetDevice | None = None,
) -> Plan:
    """The plan with the number of tokens under which dense attention is faster, for each transformer.

    Args:
        plan: A choice of the problem as a plan.
        task: The problem of all transformers together.
        choice: The candidate of each unit of that problem.
        tables: What attention costs in each transformer, by component name.
        target_device: The device whose table these are; None if they were measured here.
    """
    picked = task.density.gather(1, choice.pick[:, None])[:, 0]
    found = {}
    for name, component in plan.components.items():
        mine = picked[task.units_of(name)]
        sparse, tokens = mine[mine < 1], 0
        if len(sparse):
            density = sparse.mean().item()
            for (heads, head_dim), table in tables[name].items():
                others = target_device.smaller(head_dim, table.dtype) if target_device else None
                here = break_even_tokens(table, density, heads, head_dim, others)
                tokens = max(tokens, here)
        found[name] = replace(component, valid_tokens=(tokens, None))
    return replace(plan, components=found)
