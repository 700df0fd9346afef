"""`sparse-dit demo`: the main job, end to end, on the embedded model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from ..environment import environment
from ..eval.atlas import StageAtlas, stage_atlas
from ..eval.baselines.uniform import random_choice, uniform_plan
from ..eval.command import dense_on_drawn_clips, forced_on_drawn_clips, seam_overhead
from ..eval.forecasts import expected_psnr
from ..eval.quality import Quality, evaluate
from ..eval.report import Method, Report
from ..eval.report_files import FILES, write_report, written_files
from ..generation import Case, GenerationSettings
from ..outputs import Outputs
from ..plan import Plan
from ..plan.evidence import prompt_dependent
from ..plan.storage import tensor_path
from ..resources import shipped
from ..search import Searched, plan_of, search_plan
from ..search.front import front_path, write_front
from ..search.provenance import least_and_most
from ..timing import timing_of
from ..whole_file import uninterrupted

Say = Callable[[str], None]

CALIBRATION = (  # the last one's dense generation is also what the plan is tuned with
    Case("a red circle moves left over gray stripes", 0),
    Case("a yellow triangle moves left over purple checks", 7),
)
HELD_OUT = (
    Case("a yellow square moves down over purple stripes", 21),
    Case("a blue circle moves right over gray gradient", 22),
)
SETTINGS = GenerationSettings(192, 192, 15, steps=12, guidance=3.0, max_sequence_length=32)
QUICK = replace(SETTINGS, height=96, width=96, steps=6)
MIN_PSNR = 30.0  # on prompts that the search has not seen
TUNING_PSNR = 33.0  # on the calibration prompt: others came out up to 3 dB lower with the same plan
DRAWN_CLIPS = 2


def run_demo(
    folder: Path, force: bool = False, quick: bool = False, outputs: Outputs | None = None
) -> Report:
    """Search a plan for the embedded model, measure it on held-out prompts, and report.

    Writes `plan.json`, `report.html`, `report.json`, `atlas.png` and the videos into `folder`. The
    profile is kept beside them while the search runs, so that a stopped demo goes on from it.

    Args:
        folder: The folder that is written to; made if it isn't there.
        force: Whether files of an earlier demo may be replaced.
        quick: A small size at which attention hardly matters: to see that everything runs.
        outputs: Where the command writes to; it knows afterwards what had to be written to another place.

    Raises:
        FileExistsError: If `folder` holds files of an earlier demo and `force` is not given.
        ValueError, OSError: If it can't be written.
    """
    from ..inputs import load_pipeline
    from ..tables import out, show_quality

    say, plan_file, kept = stamped(), folder / "plan.json", folder / "profile.safetensors"
    outputs = outputs or Outputs(replace=force, say=say)
    outputs.expect_folder("--out", folder, FILES)
    outputs.expect("--out", plan_file, beside=lambda path: [tensor_path(path), front_path(path)])
    outputs.expect("--out", kept, again=True)
    settings = QUICK if quick else SETTINGS
    say(f"the embedded model at {settings.width}x{settings.height}, {settings.steps} steps")
    pipe = load_pipeline(str(shipped("tiny_wan")), "cpu", "float32")
    searched = search_plan(
        pipe,
        CALIBRATION,
        settings=settings,
        min_psnr=TUNING_PSNR,
        tune_on="calibration",
        profile=kept,
        report=say,
    )
    with uninterrupted():
        lies = outputs.write(plan_file, lambda path: searched.plan.save(path, overwrite=force))
        outputs.put(front_path(lies), lambda path: write_front(searched.front, path))
    report = measure(pipe, searched, settings, say)
    # with what was measured
    lies = outputs.put(plan_file, lambda path: report.plan.save(path, overwrite=True))
    written = outputs.write(folder, lambda path: write_report(path, report, overwrite=force))
    kept.unlink(missing_ok=True)
    out.print(report.quality.summary, markup=False, highlight=False)
    show_quality(report)
    for file in (lies, *written_files(written)):
        out.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)
    return report


def measure(pipe: Any, searched: Searched, settings: GenerationSettings, say: Say) -> Report:
    """The plan and its baselines on the same held-out prompts, none of which the search has seen."""
    plan = searched.plan
    say("the searched plan on held-out prompts")
    quality = evaluate(pipe, plan, HELD_OUT, settings, progress=say)
    dense = dense_on_drawn_clips(pipe, settings, DRAWN_CLIPS, say)
    forced = forced_on_drawn_clips(pipe, plan, settings, DRAWN_CLIPS, say, dense)
    baselines = []
    for name, text, other in _baselines(searched):
        say(f"baseline: {name}")
        result = evaluate(
            pipe, other, HELD_OUT, settings, references=quality.references, noise_cases=0
        )
        errors = forced_on_drawn_clips(pipe, other, settings, DRAWN_CLIPS, say, dense)
        baselines.append(Method.of(name, text, result, errors))
    say("what the patch itself costs")
    overhead = seam_overhead(plan, quality)
    return Report(
        title="The embedded model: sparse attention against dense",
        plan=verified(plan, quality),
        quality=quality,
        baselines=baselines,
        teacher_forced=forced,
        atlases=atlases(searched),
        search_seconds=searched.seconds["total"],
        seam_overhead=overhead,
        provenance={**environment("cpu"), "command": "sparse-dit demo"},
        notes=_notes(searched, quality),
        front=searched.front,
        expected_psnr_db=expected_psnr(plan),
    )


def verified(plan: Plan, quality: Quality) -> Plan:
    """The plan with what it gave on cases that the search hasn't seen, and these cases."""
    cases = [{"prompt": c.case.prompt, "seed": c.case.seed} for c in quality.cases]
    measured = {
        "psnr_db": round(quality.psnr_db, 3),
        **least_and_most("psnr_db", [case.psnr_db for case in quality.cases]),
        "speedup": round(quality.speedup, 4),
        **timing_of(quality.pairs),
        "held_out_cases": len(cases),
        "met": quality.psnr_db >= MIN_PSNR,
    }
    known = {**plan.provenance["cases"], "held_out": cases}
    return replace(plan, provenance={**plan.provenance, "cases": known}, measured=measured)


def _baselines(searched: Searched) -> list[tuple[str, str, Plan]]:
    plan, profile = searched.plan, searched.profile
    chance = random_choice(searched.problem, plan.density)
    return [
        (
            "uniform",
            "the best single pattern (stencil with far field) for all heads and steps",
            uniform_plan(plan, profile, by_stage=False),
        ),
        (
            "uniform, same densities",
            "the best single pattern of each stage, at the searched plan's density there",
            uniform_plan(plan, profile, by_stage=True),
        ),
        ("random", "candidates drawn at random for every head", plan_of(searched, chance)),
    ]


def atlases(searched: Searched) -> list[StageAtlas]:
    """Every head in every stage: its pattern, its attention where it was recorded, its mask."""
    ((name, part),) = searched.profile.components.items()
    component = searched.plan.components[name]
    stage_of = [  # of each level; several may be one stage
        next(n for n, stage in enumerate(component.stages) if stage.covers(sigma, "any"))
        for sigma in part.sigmas
    ]
    recall: dict[int, dict[str, list[list[float]]]] = {}
    for number, (level, layer, head) in enumerate(searched.problem.units):
        fresh = [[] for _ in range(part.heads[layer][0])]
        heads = recall.setdefault(stage_of[level], {}).setdefault(layer, fresh)
        heads[head].append(searched.problem.recall[number, searched.choice.pick[number]].item())
    recorded = stage_of[len(part.sigmas) // 2]
    pictures = {
        layer: [
            maps[head].numpy()
            if (maps := part.pictures.get((layer, c.pattern.tile))) is not None
            else None
            for head, c in enumerate(stages[recorded])
        ]
        for layer, stages in component.layers.items()
    }
    return [
        stage_atlas(
            name,
            component,
            stage,
            component.layout,
            attention=pictures if stage == recorded else None,
            recall={
                layer: [fmean(values) for values in heads] for layer, heads in recall[stage].items()
            },
            marked=prompt_dependent(searched.plan),
        )
        for stage in range(len(component.stages))
    ]


def _notes(searched: Searched, quality: Quality) -> list[str]:
    dense = quality.dense_seconds
    total = searched.seconds["total"]
    phases = ", ".join(f"{k} {v:.0f} s" for k, v in searched.seconds.items() if k != "total")
    return [
        f"The search took {total:.0f} s, {total / dense:.1f} dense generations ({phases}).",
        "The embedded model is a toy trained on drawn clips; its figures don't carry over to others.",
    ]


def stamped() -> Say:
    """Says a text with the time since it was made."""
    started = time.perf_counter()

    def say(text: str) -> None:
        seconds = int(time.perf_counter() - started)
        print(f"[{seconds // 60:2d}:{seconds % 60:02d}] {text}", file=sys.stderr, flush=True)

    return say
