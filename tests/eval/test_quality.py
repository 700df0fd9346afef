"""Quality on tiny random pipelines: what is measured is what was run."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparse_dit.bench import seam
from sparse_dit.bench.measure import Timing
from sparse_dit.eval import teacher
from sparse_dit.eval.command import seam_overhead
from sparse_dit.eval.quality import evaluate
from sparse_dit.eval.runs import noise_floor_video, record
from sparse_dit.eval.teacher import dense_predictions, teacher_forced
from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.integrations import attachment_of, workload
from sparse_dit.integrations.teacher import OneStep
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Skip
from sparse_dit.search.verify import dense_reference, verify
from sparse_dit.timing import timing_of
from tests.helpers.eval_cases import WINDOW, uniform_plan
from tests.helpers.tiny_pipelines import BUILDERS, wan

SETTINGS = GenerationSettings(64, 64, 17, steps=3, guidance=3.0, max_sequence_length=16)
CASES = [Case("a cat", 0), Case("a dog", 1)]
LAYOUT = TokenLayout.video(5, 4, 4)


@pytest.fixture(scope="module")
def pipe():
    return wan()[0]


def test_a_dense_plan_is_equal_to_dense(pipe):
    quality = evaluate(pipe, uniform_plan(pipe, Pattern(Dense()), LAYOUT), CASES, SETTINGS)
    assert quality.tokens == 80
    assert quality.density == 1
    assert quality.psnr_db == quality.psnr_min_db == math.inf
    assert quality.ssim == pytest.approx(1.0)
    assert quality.drift == [0.0, 0.0, 0.0]
    assert quality.forecast_speedup == 1.5
    assert quality.interleaved
    assert attachment_of(pipe.transformer) is None


def test_a_sparse_plan_is_not(pipe):
    said = []
    plan = uniform_plan(pipe, WINDOW, LAYOUT)
    quality = evaluate(pipe, plan, CASES, SETTINGS, noise_cases=2, progress=said.append)
    assert 0.2 < quality.density < 1
    assert quality.drift[0] == 0  # sigma 1 is above the plan's stage: dense
    assert 0 < quality.drift[1] < quality.drift[2]
    assert 10 < quality.psnr_db < quality.psnr_noise_floor_db
    assert quality.speedup == pytest.approx(quality.dense_seconds / quality.sparse_seconds)
    assert "sparse" in quality.summary
    assert any("a dog" in line for line in said)


def test_references_save_the_dense_runs(pipe):
    references = [record(workload(pipe, SETTINGS), case) for case in CASES]
    plan = uniform_plan(pipe, WINDOW, LAYOUT)
    again = evaluate(pipe, plan, CASES, SETTINGS, references=references, noise_cases=0)
    fresh = evaluate(pipe, plan, CASES, SETTINGS, noise_cases=0, warm_up=False)
    assert [c.psnr_db for c in again.cases] == [c.psnr_db for c in fresh.cases]
    assert again.references == references
    assert not again.interleaved
    assert again.psnr_noise_floor_db is None
    with pytest.raises(ValueError, match="same cases"):
        evaluate(pipe, plan, CASES[::-1], SETTINGS, references=references)


def test_a_nan_is_reported(pipe):
    broken = wan()[0]
    plan = uniform_plan(broken, WINDOW, LAYOUT)
    references = [record(workload(broken, SETTINGS), CASES[0])]
    with torch.no_grad():
        broken.transformer.proj_out.bias.fill_(math.nan)
    quality = evaluate(broken, plan, CASES[:1], SETTINGS, references=references, noise_cases=0)
    assert quality.nonfinite > 0
    assert math.isnan(quality.psnr_db) and math.isnan(quality.psnr_min_db)
    assert math.isnan(quality.ssim)


def test_the_seam_costs_what_its_benchmark_says(pipe, monkeypatch):
    plan = uniform_plan(pipe, WINDOW, LAYOUT)
    quality = evaluate(pipe, plan, CASES[:1], SETTINGS, noise_cases=0, warm_up=False)
    calls = 2 * 3 * 2  # two layers, three steps, two halves of guidance
    assert quality.sparse_calls + quality.dense_calls == calls
    assert 0 < seam_overhead(plan, quality) < 0.2
    taken = {"stock": 2e-3, "patched": 7e-3, "hook": 4e-3, "no hook": 1e-3}
    timings = {name: Timing(seconds, 0.0, 3) for name, seconds in taken.items()}
    monkeypatch.setattr(seam, "interleaved", lambda runs, **options: timings)
    added = calls * 5e-3 / seam.REPEATED + calls / 2 * 3e-3 / seam.REPEATED
    assert seam_overhead(plan, quality) == pytest.approx(added / quality.dense_seconds)


def test_what_runs_all_dense_has_no_speedup(pipe):
    plan = uniform_plan(pipe, Pattern(Dense()), LAYOUT)
    quality = evaluate(pipe, plan, CASES[:1], SETTINGS, noise_cases=0, warm_up=False)
    assert quality.pairs is None and quality.speedup == 1.0 and quality.caution is None
    assert timing_of(quality.pairs) == {"timing": "dense; not measured"}
    work = workload(pipe, SETTINGS)
    references = [dense_reference(work, CASES[0])]
    verified = verify(work, plan, references)
    assert (
        verified.pairs is None and verified.speedup == 1.0 and verified.difference["psnr_db"] == 100
    )
    windows = uniform_plan(pipe, WINDOW, LAYOUT)
    part = replace(windows.components["transformer"], valid_tokens=(10**6, None))
    below = replace(windows, components={"transformer": part})
    assert verify(work, below, references).pairs is None
    sparse = verify(work, windows, references)
    assert sparse.pairs is not None and sparse.speedup == sparse.pairs.speedups[0]


def test_wrong_use_is_refused(pipe):
    from sparse_dit.patch import patch

    plan = uniform_plan(pipe, WINDOW, LAYOUT)
    with pytest.raises(ValueError, match="at least one prompt"):
        evaluate(pipe, plan, [], SETTINGS)
    with patch(pipe, plan), pytest.raises(ValueError, match="is patched"):
        evaluate(pipe, plan, CASES, SETTINGS)


@pytest.mark.parametrize("family", BUILDERS)
def test_every_family_generates_and_has_a_noise_floor(family):
    pipe, call = BUILDERS[family]()
    frames = call.get("num_frames", 1)
    settings = GenerationSettings(call["height"], call["width"], frames, 2, 3.0)
    work = workload(pipe, settings)
    run = record(work, Case("a cat", 3))
    assert run.video.ndim == 4 and run.video.shape[-1] == 3
    assert run.video.shape[0] == frames
    assert len(run.latents) == 2
    again, taken = work.run(Case("a cat", 3))
    assert (again == run.video).all() and taken.seconds > 0
    floor = noise_floor_video(work, Case("a cat", 3))
    # a model of random weights may jump in a few pixels at the last bits of a sum
    assert np.quantile(abs(floor - run.video), 0.9) < 1e-3
    assert attachment_of(pipe.transformer) is None


def test_an_image_pipeline_takes_no_frames():
    pipe, _ = BUILDERS["flux"]()
    with pytest.raises(ValueError, match="takes no num_frames"):
        workload(pipe, GenerationSettings(64, 64, 9, 1, 1.0)).run(Case("a cat"))


def test_progress_bar_setting_survives(pipe):
    before = dict(pipe._progress_bar_config)
    workload(pipe, GenerationSettings(64, 64, 5, 1, 1.0)).run(CASES[0])
    assert pipe._progress_bar_config == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 64), "height must be a whole number"),
        ((64, 64, 0), "num_frames"),
        ((64, 64, 5, -1), "steps"),
        ((64, 64, 5, 2.5), "steps"),
        ((64, 64, 5, 2, math.nan), "guidance"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(*values)


def test_bad_sizes_and_cases(pipe):
    with pytest.raises(ValueError, match="multiple of 16"):
        workload(pipe, GenerationSettings(60, 64, 5, 1, 1.0)).run(CASES[0])
    for prompt in ("", "  ", None):
        with pytest.raises(ValueError, match="not empty"):
            Case(prompt)
    with pytest.raises(ValueError, match="seed"):
        Case("a cat", -1)
    settings = GenerationSettings(64, 64, 5, 1, 1.0)
    assert GenerationSettings.from_dict(settings.to_dict()) == settings
    with pytest.raises(ValueError, match="unknown"):
        GenerationSettings.from_dict({**settings.to_dict(), "fps": 3})


def clip(frames: int = 17) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, frames, 64, 64, generator=generator) * 2 - 1


def test_teacher_forced_error(pipe):
    clips = [(clip(), "a cat"), (clip(14), "a dog")]
    sigmas = [0.3, 0.9]

    def errors(pattern):
        plan = uniform_plan(pipe, pattern, LAYOUT)
        return teacher_forced(pipe, plan, clips, sigmas, max_sequence_length=16)

    assert [entry.velocity_error for entry in errors(Pattern(Dense()))] == [0.0, 0.0]
    window, skip = errors(WINDOW), errors(Pattern(Skip()))
    assert [entry.sigma for entry in window] == sigmas
    assert all(entry.clips == 2 and math.isfinite(entry.psnr_db) for entry in window)
    for near, nothing in zip(window, skip, strict=True):
        assert 0 < near.velocity_error < nothing.velocity_error
    assert attachment_of(pipe.transformer) is None


def test_dense_predictions_serve_several_plans(pipe, monkeypatch):
    clips, sigmas = [(clip(), "a cat")], [0.3, 0.9]
    plans = [uniform_plan(pipe, pattern, LAYOUT) for pattern in (WINDOW, Pattern(Skip()))]
    options = {"max_sequence_length": 16}
    apart = [teacher_forced(pipe, plan, clips, sigmas, **options) for plan in plans]
    dense = dense_predictions(pipe, clips, sigmas, **options)
    monkeypatch.setattr(teacher, "dense_predictions", lambda *args, **kwargs: 1 / 0)
    shared = [teacher_forced(pipe, plan, clips, sigmas, dense=dense, **options) for plan in plans]
    assert shared == apart
    with pytest.raises(ValueError, match="dense predictions must be of the same request"):
        teacher_forced(pipe, plans[0], clips, [0.5], dense=dense, **options)


def test_latents_are_those_of_the_pipeline(pipe):
    """Encoding and decoding are each other's inverse as far as the VAE allows: same statistics."""
    latents = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor(pipe.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(pipe.vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        expected = pipe.vae.decode(latents * std + mean).sample
        video = OneStep(pipe).decode(latents)
        assert (
            abs(torch.from_numpy(video) - (expected[0].permute(1, 2, 3, 0) / 2 + 0.5)).max() < 1e-5
        )
        encoded = OneStep(pipe).encode(clip(9))
        raw = pipe.vae.encode(clip(9)[None]).latent_dist.mode()
    assert torch.allclose(encoded * std + mean, raw, atol=1e-5)


def test_teacher_forced_refuses(pipe):
    plan = uniform_plan(pipe, WINDOW, LAYOUT)
    for clips, sigmas in (([], [0.5]), ([(clip(), "a")], []), ([(clip(), "a")], [0.0])):
        with pytest.raises(ValueError, match="clips and sigmas"):
            teacher_forced(pipe, plan, clips, sigmas)
    with pytest.raises(NotImplementedError, match="WanPipeline"):
        teacher_forced(BUILDERS["flux"]()[0], plan, [(clip(), "a")], [0.5])
