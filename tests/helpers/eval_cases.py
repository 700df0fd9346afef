"""Plans for tiny pipelines and a report from made-up numbers, for the tests of eval and the CLI."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sparse_dit.eval.atlas import stage_atlas
from sparse_dit.eval.differences import difference
from sparse_dit.eval.quality import CaseQuality, Quality
from sparse_dit.eval.report import Method, Report
from sparse_dit.eval.runs import Recorded
from sparse_dit.eval.sizes import SizeRow
from sparse_dit.eval.teacher import TeacherForced
from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.integrations.diffusers import components, heads_of
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, SlidingTile, Stripe, Window
from sparse_dit.plan import ComponentPlan, HeadChoice, Plan, Stage, config_hash
from sparse_dit.search.front import Front, Point
from sparse_dit.timing import Taken

WINDOW = Pattern(Window(frames=1, rows=1, columns=1), tile=(2, 2, 2), far=True)


def uniform_plan(pipe: Any, pattern: Pattern, layout: TokenLayout) -> Plan:
    """Every head of every layer runs `pattern` below sigma .95."""
    parts = {}
    for name, part in components(pipe).items():
        heads, choice = heads_of(part), HeadChoice(pattern, 0.1)
        parts[name] = ComponentPlan(
            model_class=type(part).__name__,
            config_hash=config_hash(part.config),
            heads=heads,
            layout=layout,
            stages=(Stage(0.95, 0.0),),
            layers={layer: ((choice,) * num_heads,) for layer, (num_heads, _) in heads.items()},
        )
    return Plan(type(pipe).__name__, parts, density=0.5, forecast={"speedup": 1.5})


def made_up_plan(layers: int = 2) -> Plan:
    """A plan of four heads a layer in two stages, for no model in particular."""
    shapes = [Window(frames=0), Stripe(time_width=1), Window(rows=2, columns=2), SlidingTile()]
    patterns = [Pattern(shape, far=i % 2 == 0) for i, shape in enumerate(shapes)]
    dense = tuple(HeadChoice(Pattern(Dense()), 0.0) for _ in patterns)
    sparse = tuple(
        HeadChoice(pattern, 0.05 * i, patterns[i - 1], 0.07 * i)
        for i, pattern in enumerate(patterns)
    )
    component = ComponentPlan(
        model_class="WanTransformer3DModel",
        config_hash="0" * 64,
        heads={f"blocks.{i}.attn1": (4, 64) for i in range(layers)},
        layout=TokenLayout.video(8, 16, 16),
        stages=(Stage(1.0, 0.9), Stage(0.9, 0.0)),
        layers={f"blocks.{i}.attn1": (dense, sparse) for i in range(layers)},
    )
    return Plan("WanPipeline", {"transformer": component}, density=0.4)


def moving_square(seed: int, frames: int = 8, side: int = 48) -> np.ndarray:
    """A bright square over a gradient, `[T, side, side, 3]`."""
    video = np.zeros((frames, side, side, 3), np.float32)
    video[..., seed % 3] = np.linspace(0.2, 0.6, side)
    for t in range(frames):
        video[t, 12:24, 3 * t + 4 : 3 * t + 16] = (0.9, 0.8, 0.1)
    return video


def made_up_quality(**changes: Any) -> Quality:
    """Two cases with given numbers."""
    cases = [Case("a red square moves <right>", 0), Case("a blue square moves left", 1)]
    dense = [moving_square(i) for i in range(2)]
    noise = np.random.default_rng(0).normal(0, 0.02, dense[0].shape).astype(np.float32)
    rows = [
        CaseQuality(
            case=case,
            dense_seconds=12.0 + i,
            sparse_seconds=8.0,
            dense_wall=12.1 + i,
            sparse_wall=8.1,
            psnr_db=33.5 + i,
            psnr_flat_db=14.0,
            psnr_noise_floor_db=71.0 if i == 0 else None,
            metrics={"ssim": 0.95},
            drift=[0.01, 0.02, 0.05, 0.06],
            nonfinite_dense=0,
            nonfinite_sparse=0,
        )
        for i, case in enumerate(cases)
    ]
    values: dict[str, Any] = {
        "settings": GenerationSettings(48, 48, 7, steps=4, guidance=3.0),
        "tokens": 2048,
        "density": 0.31,
        "forecast_speedup": 1.6,
        "cases": rows,
        "interleaved": True,
        "summary": "ran 40 sparse and 8 dense attention calls",
        "sparse_calls": 40,
        "dense_calls": 8,
        "references": [
            Recorded(case, video, [torch.zeros(1)], Taken(12.0, 12.1))
            for case, video in zip(cases, dense, strict=True)
        ],
        "sparse_videos": [np.clip(video + noise, 0, 1) for video in dense],
    }
    values |= changes
    for name in ("references", "sparse_videos"):  # one for each case
        values[name] = values[name][: len(values["cases"])]
    return Quality(**values)


def made_up_front() -> Front:
    """Points from dense to 3x; the PSNR falls with speed, one point is worse than its neighbours."""
    rows = [(1.0, 1.0, 0.0, 100.0), (1.5, 0.5, 0.02, 35.0), (1.6, 0.45, 0.05, 27.0)]
    rows += [(2.0, 0.3, 0.04, 29.0), (3.0, 0.1, 0.1, 21.0)]
    points = [
        Point(
            speedup=speedup, density=density, error=error, seconds=12 / speedup, psnr=psnr,
            patterns=[0], errors=[error],
        )
        for speedup, density, error, psnr in rows
    ]  # fmt: skip
    return Front("0" * 64, 12.0, (Pattern(Dense()),), tuple(points))


def coarser(plan: Plan) -> Plan:
    """The plan with one stage for all sigmas: in it the first head has another kind, the second one
    other parameters, the others are equal."""
    part = plan.components["transformer"]
    layers = {}
    for layer, (_, sparse) in part.layers.items():
        heads = (HeadChoice(Pattern(SlidingTile())), HeadChoice(Pattern(Stripe(time_width=2))))
        layers[layer] = ((*heads, *sparse[2:]),)
    part = replace(part, stages=(Stage(1.0, 0.0),), layers=layers)
    return replace(plan, components={"transformer": part}, density=0.25)


def made_up_report(**changes: Any) -> Report:
    """A complete report; the numbers mean nothing."""
    plan = made_up_plan()
    component = plan.components["transformer"]
    rng = np.random.default_rng(1)
    attention = {
        layer: [rng.random((64, 64)) ** 8 + np.eye(64) for _ in range(3)] + [None]
        for layer in component.layers
    }
    recall = {layer: [0.9, 0.8, None, 0.7] for layer in component.layers}
    atlases = [
        stage_atlas("transformer", component, 0, component.layout),
        stage_atlas(
            "transformer", component, 1, component.layout, attention=attention, recall=recall
        ),
    ]
    values: dict[str, Any] = {
        "title": "Tiny model: searched plan against dense",
        "plan": plan,
        "quality": made_up_quality(),
        "baselines": [
            Method("uniform", "best single pattern", 0.31, 24.0, 23.0, 0.8, 8.1, 1.5, 0.11),
            Method("random", "random patterns, equal density", 0.31, 19.0, 18.0, 0.6, 8.2, 1.5),
        ],
        "teacher_forced": [TeacherForced(s, s / 9, 40 - 9 * s, 15.0, 3) for s in (0.3, 0.6, 0.9)],
        "atlases": atlases,
        "search_seconds": 61.0,
        "seam_overhead": 0.004,
        "provenance": {"sparse_dit": "0.1.0", "command": "sparse-dit demo"},
        "notes": ["A note of the measurer."],
        "front": made_up_front(),
        "expected_psnr_db": 31.0,
        "difference": difference("other.json", coarser(plan), plan),
        "sizes": [
            SizeRow.of(plan, made_up_quality()),
            SizeRow.of(plan, made_up_quality(layout=component.layout)),
        ],
    }
    return Report(**{**values, **changes})
