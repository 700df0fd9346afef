"""Measure a plan and write its report: what `sparse-dit eval` does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..bench.seam import share_of_generation
from ..environment import environment
from ..fastest import STOCK
from ..generation import Case, GenerationSettings
from ..integrations import host_of
from ..outputs import Outputs
from ..patch import patch
from ..plan import Plan
from ..plan.evidence import prompt_dependent
from ..words import option
from .atlas import StageAtlas, stage_atlas
from .differences import difference
from .draw import draw
from .forecasts import expected_psnr
from .heads import HeadQuality, head_quality
from .quality import Quality, evaluate
from .report import Report
from .report_files import FILES, write_report, written_files
from .sizes import SizeRow, check_sizes, evaluate_sizes
from .teacher import DensePredictions, TeacherForced, dense_predictions, teacher_forced

if TYPE_CHECKING:
    from ..search.front import Front

SIGMAS = (0.3, 0.6, 0.9)
HEAD_STEPS = 8


@dataclass(frozen=True)
class Request:
    """What is to be measured, and where to.

    Attributes:
        folder: The folder that the report is written to.
        cases: Prompts and seeds.
        settings: Size, steps, guidance.
        drawn_clips: How many clips are drawn for the teacher-forced error; 0 leaves it out.
        fps: The frames a second that the videos are written with.
        force: Whether files in `folder` may be replaced.
        front: The other choices that the plan's search knew; None if they aren't kept beside it.
        against: Name of another plan, and the plan, to show the difference to.
        sizes: Width, height and frames of other sizes to measure the plan at.
        dense: Who computes the plan's dense calls, as `patch` takes it.
    """

    folder: Path
    cases: list[Case]
    settings: GenerationSettings
    drawn_clips: int = 0
    fps: float = 8
    force: bool = False
    front: Front | None = None
    against: tuple[str, Plan] | None = None
    sizes: Sequence[tuple[int, int, int]] = ()
    dense: str = STOCK

    def check(self, pipe: Any, plan: Plan) -> None:
        """Raise, before anything is generated, if the plan or a size isn't for this pipeline.

        Args:
            pipe: A stock pipeline, or an `outline`.
            plan: What is to be measured.
        """
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"{option('fps')} must be a finite number > 0, got {self.fps}")
        others = [replace(self.settings, width=w, height=h, num_frames=f) for w, h, f in self.sizes]
        check_sizes(pipe, self.cases[0], [self.settings, *others])
        with patch(pipe, plan, dense=self.dense):
            pass


def evaluate_plan(
    pipe: Any,
    plan: Plan,
    request: Request,
    command: str,
    say: Callable[[str], None],
    outputs: Outputs | None = None,
) -> tuple[Report, list[Path]]:
    """Measure quality, speed, the seam and, if asked for, the teacher-forced error; write it all.

    Args:
        pipe: A stock pipeline.
        plan: A plan for that pipeline.
        request: What is measured, and where the report is written to.
        command: The command line, which the report notes.
        say: Called with a line of text before each part.
        outputs: Where the command writes to, if it has checked the folder already.
    """
    if outputs is None:
        outputs = Outputs(replace=request.force, say=say)
        outputs.expect_folder("folder", request.folder, FILES)
    request.check(pipe, plan)
    quality = evaluate(
        pipe, plan, request.cases, request.settings, dense=request.dense, progress=say
    )
    say("what the patch itself costs")
    overhead = seam_overhead(plan, quality)
    heads = _heads(pipe, plan, request, say)
    report = Report(
        title=f"{type(pipe).__name__}: sparse attention against dense",
        plan=plan,
        quality=quality,
        teacher_forced=forced_on_drawn_clips(
            pipe, plan, request.settings, request.drawn_clips, say
        ),
        atlases=plan_atlases(plan, heads),
        search_seconds=_search_seconds(plan),
        seam_overhead=overhead,
        provenance={**environment(pipe.device), "command": command},
        notes=[_held_out_error(heads)] if heads else [],
        fps=request.fps,
        front=request.front,
        expected_psnr_db=expected_psnr(plan),
        difference=difference(*request.against, plan) if request.against else None,
        sizes=_other_sizes(pipe, plan, quality, request, say),
    )
    folder = outputs.write(
        request.folder, lambda path: write_report(path, report, overwrite=request.force)
    )
    return report, written_files(folder)


def seam_overhead(plan: Plan, quality: Quality) -> float:
    """What the patch itself adds to a dense generation, as a share of it."""
    layers = sum(len(part.layers) for part in plan.components.values())
    calls = quality.sparse_calls + quality.dense_calls
    return share_of_generation(calls, layers // len(plan.components), quality.dense_seconds)


def _other_sizes(
    pipe: Any, plan: Plan, quality: Quality, request: Request, say: Callable[[str], None]
) -> list[SizeRow]:
    """A row for the size of the report and for each other one; empty if no other is asked for."""
    settings = request.settings
    here = (settings.width, settings.height, settings.num_frames)
    others = [size for size in request.sizes if size != here]
    if not others:
        return []
    rows = evaluate_sizes(pipe, plan, request.cases, settings, others, say)
    return [SizeRow.of(plan, quality), *rows]


def plan_atlases(plan: Plan, heads: dict[str, HeadQuality]) -> list[StageAtlas]:
    """Masks and recall of every component and stage; pictures of attention aren't recorded."""
    marked = prompt_dependent(plan)
    return [
        stage_atlas(
            name,
            part,
            stage,
            part.layout,
            recall={
                layer: scored.recall[:, 0].tolist()
                for (at, layer), scored in heads.get(name, {}).items()
                if at == stage
            },
            marked=marked,
        )
        for name, part in plan.components.items()
        for stage in range(len(part.stages))
    ]


def _heads(
    pipe: Any, plan: Plan, request: Request, say: Callable[[str], None]
) -> dict[str, HeadQuality]:
    """Error and recall of heads on the first case, in a run of few steps; empty if not measurable."""
    steps = min(HEAD_STEPS, request.settings.steps)
    say(f"error and recall of every head, {steps} steps")
    try:
        return head_quality(pipe, plan, request.cases[0], replace(request.settings, steps=steps))
    except NotImplementedError as reason:
        say(f"not measured: {reason}")
        return {}


def _held_out_error(heads: dict[str, HeadQuality]) -> str:
    every = [scored for part in heads.values() for scored in part.values()]
    if not every:
        return "The plan covers no attention call of this run, so heads have no error."
    error = torch.cat([scored.relative_error[:, 0] for scored in every]).mean().item()
    recall = torch.cat([scored.recall[:, 0] for scored in every]).mean().item()
    return (
        f"Mean relative error of head outputs on the first case: {error:.4f}; "
        f"mean attention recall {recall:.3f} (sampled rows)."
    )


def forced_on_drawn_clips(
    pipe: Any,
    plan: Plan,
    settings: GenerationSettings,
    count: int,
    say: Callable[[str], None],
    dense: DensePredictions | None = None,
) -> list[TeacherForced]:
    """The teacher-forced error on `count` drawn clips of the size that the pipeline generates.

    Args:
        pipe: A stock pipeline.
        plan: The plan that is measured.
        settings: The size that the pipeline generates, and the length of its text.
        count: How many clips are drawn; 0 measures nothing.
        say: Called with a line of text before each pass.
        dense: What `dense_on_drawn_clips` gave for the same settings and count.
    """
    if not count:
        return []
    clips, length = _drawn_clips(pipe, settings, count), settings.max_sequence_length or 512
    return teacher_forced(
        pipe, plan, clips, SIGMAS, max_sequence_length=length, dense=dense, progress=say
    )


def dense_on_drawn_clips(
    pipe: Any, settings: GenerationSettings, count: int, say: Callable[[str], None]
) -> DensePredictions:
    """The dense predictions that `forced_on_drawn_clips` compares with, which are the same for every plan."""
    clips, length = _drawn_clips(pipe, settings, count), settings.max_sequence_length or 512
    return dense_predictions(pipe, clips, SIGMAS, max_sequence_length=length, progress=say)


def _drawn_clips(pipe: Any, settings: GenerationSettings, count: int) -> list[tuple[Tensor, str]]:
    frames = host_of(pipe).one_step(pipe).frames(settings.num_frames)
    rng = Random(0)
    return [draw(frames, settings.height, settings.width, rng) for _ in range(count)]


def _search_seconds(plan: Plan) -> float | None:
    seconds = plan.provenance.get("search_seconds")
    total = seconds.get("total") if isinstance(seconds, dict) else None
    return float(total) if isinstance(total, int | float) else None
