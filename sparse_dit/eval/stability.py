"""How much a plan depends on the prompts it is calibrated with: plans from few prompts against one from more.

Every plan is solved for the same density, so that no clock is read; a noise level counts as much as any
other. What they cost is measured on prompts that none of them has seen, on the same sampled rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..integrations import components, workload
from ..on_cpu import on_cpu
from ..outputs import Outputs, check_writable
from ..patterns import Pattern
from ..plan import Plan, config_hash
from ..search.assemble import first_plan
from ..search.cost import CostTable
from ..search.objective import PSNR
from ..search.profile import ComponentProfile
from ..search.profiling import profile_pipeline
from ..search.sensitivity import Sensitivity, sensitivity
from ..search.solve import Choice, Problem, joined, least_loss, problem, stages_of
from ..search.verify import Reference, dense_reference, verify
from ..words import option
from .baselines.scores import score_patterns
from .repeats import repeat_searches
from .stability_file import StabilityRequest, StabilityRow, StabilityState

Say = Callable[[str], None]
NEAR = 1.25  # densities within this factor count as near
_REST = 1e-3  # of a dense generation, outside of attention; not 0, as all heads may be skipped


@dataclass(frozen=True, eq=False)
class _Solved:
    part: ComponentProfile
    problem: Problem
    choice: Choice
    plan: Plan

    @property
    def patterns(self) -> list[Pattern]:
        """The chosen pattern of each unit: of each stage, layer and head."""
        picks = self.choice.pick.tolist()
        return [listed[pick] for listed, pick in zip(self.problem.candidates, picks, strict=True)]


@on_cpu
def stability(
    pipe: Any, request: StabilityRequest, say: Say, outputs: Outputs | None = None
) -> StabilityState:
    """Profile with few and with more prompts, solve, compare the plans, and judge them held-out.

    Profiles are kept in a folder beside the file, and the file is written after each measurement: the
    same call goes on where it stopped.

    Args:
        pipe: A diffusers pipeline with one transformer, not patched.
        request: What to compare.
        say: Called with a line of text before each step.
        outputs: Knows afterwards where the file lies, if it couldn't be written where it should.

    Returns:
        What was found: `rows`, one for each count, and `repeats`, one for each search of the same settings.

    Raises:
        ValueError: If the file holds something else, the density is out of reach, or the pipeline has
            several transformers or gives NaN.
        PlanError: If a profile file is damaged.
    """
    name, state = started(pipe, request)
    state.outputs = outputs or Outputs(replace=True, say=say)
    solved = _solve_all(pipe, name, request, state, say)
    if not state.rows:
        say(f"judging {len(solved)} plans on {len(request.held_out)} held-out prompts")
        errors = _held_out_errors(pipe, name, request, solved)
        state.rows = [_row(n, solved, k, errors) for k, n in enumerate(request.counts)]
        state.write()
    references = _References(pipe, request, say)
    if request.generate and any(row.psnr_db is None for row in state.rows):
        _generate(solved, state, references, say)
    if request.repeats > 1:
        repeat_searches(pipe, name, request, state, references.psnr, say)
    return state


def started(pipe: Any, request: StabilityRequest) -> tuple[str, StabilityState]:
    """The name of the pipeline's transformer, and what the file holds of it.

    Args:
        pipe: A loaded pipeline, or an `outline` of one.
        request: What to compare.

    Raises:
        ValueError: See `stability`.
        OSError: If the file or the profiles beside it can't be written.
    """
    found = components(pipe)
    if len(found) != 1:
        raise ValueError(
            f"the pipeline must have one transformer, got {len(found)} ({', '.join(found)}): search it with "
            "one list of prompts and with another, and compare the plans with `sparse-dit eval`"
        )
    ((name, module),) = found.items()
    workload(pipe, request.settings).check(request.calibration[0])
    for file in (request.file, request.profiles / "x.safetensors"):
        check_writable(file, "file")
    config: Any = module.config
    return name, StabilityState.started(request, config_hash(config))


def _solve_all(
    pipe: Any,
    name: str,
    request: StabilityRequest,
    state: StabilityState,
    say: Say,
) -> list[_Solved]:
    """A plan for each count."""
    settings = replace(request.settings, steps=request.profile_steps)
    parts = []
    for count in request.counts:
        say(f"profiling {count} prompt{'s' * (count > 1)}")
        profile = profile_pipeline(
            pipe,
            request.calibration[:count],
            settings,
            rows=request.rows,
            path=request.profiles / f"{count}-prompts.safetensors",
            beyond=False,  # all is judged at this size
            say=say,
        )
        parts.append(profile.components[name])
    stages = stages_of(parts[0].sigmas)
    if state.sensitivity is None:
        say("measuring how much each noise level and layer matters")
        small = workload(pipe, request.settings).reduced()
        case = request.calibration[0]
        state.sensitivity = sensitivity(small, name, stages, parts[0].layers, case)
        state.write()
    return [_solved(pipe, name, part, state.sensitivity, request.density) for part in parts]


def _solved(
    pipe: Any, name: str, part: ComponentProfile, weights: Sensitivity, density: float
) -> _Solved:
    """The plan of least loss with at most that density."""
    stages = stages_of(part.sigmas)
    total = len(stages) * part.total_heads
    line = ((1e-6, 1e-6), (1.0, 1.0))
    table = CostTable(part.known_layout, 1.0, {False: line, True: line}, "none", 1, "none", "none")
    rest = _REST * total
    costs = dict.fromkeys(part.head_sizes, table)
    task = problem(part, stages, weights, costs, [1] * len(stages), total + rest)
    task = joined({name: task}, {name: 1.0}, total + rest)
    choice = least_loss(task, (1 + _REST) / (density + _REST))
    if choice is None:
        least = (task.density.amin(1) * task.weight).sum().item()
        raise ValueError(
            f"{option('density')} must be at least {least:.3f} at this size, got {density}"
        )
    plan = first_plan(type(pipe).__name__, {name: part}, task, choice, {name: costs})
    return _Solved(part, task, choice, replace(plan, cost={}, forecast={}))


def _held_out_errors(
    pipe: Any, name: str, request: StabilityRequest, solved: Sequence[_Solved]
) -> Tensor:
    """Squared relative error of each unit's pattern in each plan, float64 `[U, K]`, mean over cases."""
    part, units = solved[-1].part, solved[-1].problem.units
    chosen = list(zip(*(plan.patterns for plan in solved), strict=True))
    patterns = {unit: list(listed) for unit, listed in zip(units, chosen, strict=True)}
    settings = replace(request.settings, steps=request.profile_steps)
    total = torch.zeros(len(units), len(solved), dtype=torch.float64)
    for case in request.held_out:
        error = score_patterns(pipe, name, part, patterns, case, settings, request.rows)
        for number, (stage, layer, head) in enumerate(units):
            total[number] += error[stage, part.layers.index(layer), head]
    return total / len(request.held_out)


def _row(count: int, solved: Sequence[_Solved], number: int, errors: Tensor) -> StabilityRow:
    mine, most = solved[number], solved[-1]
    weight = most.problem.importance
    loss = (errors * weight[:, None]).sum(0)
    pairs = list(zip(mine.patterns, most.patterns, strict=True))
    density = [
        one.problem.density.gather(1, one.choice.pick[:, None])[:, 0].clamp_min(1e-6)
        for one in (mine, most)
    ]
    near = (density[0] / density[1]).log().abs() <= math.log(NEAR) + 1e-9
    return StabilityRow(
        prompts=count,
        density=round(mine.choice.density, 5),
        expected_error=round(mine.choice.error, 6),
        held_out_error=round(math.sqrt((loss[number] / weight.sum()).item()), 6),
        loss=round((loss[number] / loss[-1].clamp_min(1e-30)).item(), 4),
        same_pattern=round(sum(a == b for a, b in pairs) / len(pairs), 4),
        same_kind=round(sum(_kind(a) == _kind(b) for a, b in pairs) / len(pairs), 4),
        near_density=round(near.double().mean().item(), 4),
    )


def _kind(pattern: Pattern) -> tuple[Any, ...]:
    return pattern.name, pattern.tile, pattern.far


class _References:
    """Dense videos of the held-out prompts, made when they are first needed.

    Args:
        pipe: The pipeline, not patched.
        request: What is compared.
        say: Called with a line of text before they are made.
    """

    def __init__(self, pipe: Any, request: StabilityRequest, say: Say) -> None:
        self._work = workload(pipe, request.settings)
        self._held_out, self._say = request.held_out, say
        self._made: list[Reference] | None = None

    def psnr(self, plan: Plan) -> list[float]:
        """PSNR of each held-out prompt with the plan, in dB."""
        if self._made is None:
            self._say(f"dense references of {len(self._held_out)} held-out prompts")
            self._made = [dense_reference(self._work, case) for case in self._held_out]
        found = verify(self._work, plan, self._made).by_case
        return [round(case[PSNR], 3) for case in found]


def _generate(
    solved: Sequence[_Solved], state: StabilityState, references: _References, say: Say
) -> None:
    """PSNR of every plan that has none yet; written after each."""
    for number, row in enumerate(state.rows):
        if row.psnr_db is None:
            say(f"held-out prompts with the plan from {row.prompts}")
            found = references.psnr(solved[number].plan)
            mean = round(sum(found) / len(found), 3)
            state.rows[number] = replace(row, psnr_db=mean, psnr_least_db=min(found))
            state.write()
