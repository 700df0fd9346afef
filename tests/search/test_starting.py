"""Starting plans without a search: for every pipeline, near the density, and honest about themselves."""

import functools
import importlib
import inspect
import logging

import pytest
import torch

import sparse_dit
from sparse_dit import cli, patch
from sparse_dit.generation import GenerationSettings
from sparse_dit.index import pattern_index
from sparse_dit.integrations.diffusers import components
from sparse_dit.integrations.loading import weightless
from sparse_dit.layout import Segment, TokenLayout
from sparse_dit.plan import Plan, config_hash
from sparse_dit.resources import shipped
from sparse_dit.search.geometry import NOTE, Reach, density_of, fitted
from sparse_dit.search.starting import geometric_plan
from tests.helpers import tiny_image_models, tiny_pipelines, tiny_video_pipelines
from tests.helpers.tiny_pipelines import generate, wan

PIPELINES = {
    **tiny_pipelines.BUILDERS,
    **tiny_video_pipelines.PIPELINES,
    **tiny_image_models.BUILDERS,
}
UNTOLD = {"cosmos2"}  # its noise levels aren't its scheduler's timesteps
TINY = str(shipped("tiny_wan"))
SIZE = ["--height", "64", "--width", "64", "--num-frames", "7", "--max-sequence-length", "32"]


def never(*args, **kwargs):
    raise AssertionError("the transformer's forward must not run")


def never_for():
    """A function of its own that says the same, to be given another's signature."""
    return lambda *args, **kwargs: never(*args, **kwargs)


@pytest.mark.filterwarnings("ignore")  # the host's own, which differ by pipeline
@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_gets_a_plan_that_fits_it_without_a_forward(name, monkeypatch):
    pipe, call = PIPELINES[name]()
    with monkeypatch.context() as patched:
        for transformer in components(pipe).values():
            # a denoiser may ask forward what it takes
            patched.setattr(
                transformer, "forward", functools.wraps(transformer.forward)(never_for())
            )
        plan = geometric_plan(pipe, density=0.5, call=call)
    assert plan.components.keys() == components(pipe).keys()
    assert plan.forecast == {"note": NOTE}
    assert plan.measured == {}
    told = plan.provenance["schedule"]["noise_levels"]
    assert told == ("assumed even" if name in UNTOLD else "the scheduler's")
    for part, transformer in zip(plan.components.values(), components(pipe).values(), strict=True):
        assert part.config_hash == config_hash(transformer.config)
    patch(pipe, plan).remove()


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan_video", "flux", "sd3"])
def test_it_runs_at_the_density_that_it_says(name):
    """Text at the start, at the end, or none; video and image; few layers, so none is kept dense."""
    pipe, call = PIPELINES[name]()
    plan = geometric_plan(pipe, density=0.6, call={**call, "num_inference_steps": 4})
    stock = generate(pipe, call, num_inference_steps=4)
    with patch(pipe, plan) as handle:
        sparse = generate(pipe, call, num_inference_steps=4)
    assert handle.summary().sparse_calls > 0
    assert handle.summary().density == pytest.approx(plan.density, abs=1e-4)
    assert not torch.equal(sparse, stock)
    assert sparse.isfinite().all()


LARGE = {
    "Wan 2.1 14B": TokenLayout.video(21, 45, 80),
    "LTX": TokenLayout.video(21, 16, 22),
    "Flux": TokenLayout.video(1, 64, 64, text_before=512),
    "Qwen-Image": TokenLayout.video(1, 83, 104, text_before=100),
}
LEAST = {"Flux": 0.3}  # of text alone it has .21


@pytest.mark.parametrize(
    ("size", "density"),
    [(s, d) for s in LARGE for d in (0.2, 0.35, 0.6) if s != "Wan 2.1 14B" or d == 0.35],
)
def test_the_density_asked_for_is_reached_at_usual_sizes(size, density):
    pipe, _ = wan(num_layers=8)
    plan = geometric_plan(pipe.transformer, density=density, layout=LARGE[size])
    assert plan.pipeline_class == ""
    if density >= LEAST.get(size, 0):
        assert plan.density == pytest.approx(density, rel=0.05)
    else:
        assert plan.density > density
    (share,) = plan.provenance["stage_shares"]["transformer"]
    part = plan.components["transformer"]
    computed = pattern_index(part.distinct_patterns[0], LARGE[size]).density
    layers = len(part.layers) / 8
    assert plan.density == pytest.approx(1 - share * layers * (1 - computed), abs=1e-5)


def test_more_than_a_few_percent_off_is_said(caplog):
    pipe, _ = wan()
    layout = TokenLayout.video(1, 8, 8, text_after=300)
    with caplog.at_level(logging.WARNING, "sparse_dit"):
        plan = geometric_plan(pipe.transformer, density=0.3, layout=layout)
    assert plan.density > 0.9
    assert f"asked for a density of 0.3, reached {plan.density:.3f}" in caplog.text
    assert plan.provenance["asked_density"] == 0.3


def test_an_image_has_no_frames_to_see():
    found = fitted({TokenLayout.video(1, 64, 64): 1.0}, 0.3)
    assert (found.neighbours, found.first) == (None, False)
    video = fitted({TokenLayout.video(21, 30, 52): 1.0}, 0.5)
    assert video.neighbours is not None, "a video's heads see their own frame where there is room"


@pytest.mark.parametrize(
    "layout",
    [
        TokenLayout.video(3, 9, 10, text_before=5, text_after=7),
        TokenLayout.video(1, 16, 16),
        TokenLayout((Segment.global_(3), Segment.grid(2, 8, 8), Segment.global_(2), Segment.grid(1, 8, 8))),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("reach", [Reach(tile=(1, 4, 4)), Reach(None, 0.2, 0.3, False)], ids=str)
def test_density_is_counted_as_an_index_has_it(layout, reach):
    counted = density_of(reach.pattern, layout)
    assert counted == pytest.approx(pattern_index(reach.pattern, layout).density, abs=1e-12)


def test_noise_levels_are_those_of_the_run():
    pipe, call = wan()
    plan = geometric_plan(pipe, density=0.7, call={**call, "num_inference_steps": 8})
    dense = plan.provenance["schedule"]["dense_steps"]
    assert dense > 0
    with patch(pipe, plan) as handle:
        generate(pipe, call, num_inference_steps=8)
    summary = handle.summary()
    forwards = 2 * 2  # layers, guidance
    assert summary.sparse_calls == (8 - dense) * forwards
    assert summary.dense_calls == dense * forwards


def test_two_transformers_share_one_geometry():
    pipe, call = wan(second=True)
    plan = geometric_plan(pipe, density=0.6, call={**call, "num_inference_steps": 8})
    first, second = plan.components.values()
    assert first.distinct_patterns == second.distinct_patterns
    with patch(pipe, plan) as handle:
        generate(pipe, call, num_inference_steps=8)
    for name, ran in handle.ran.items():
        sparse = sum(r.calls for r in ran if r.dense_because is None) / (8 * 2 * 2)
        assert plan.provenance["stage_shares"][name] == [pytest.approx(sparse)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"density": 0}, "density must be a number above 0 and below 1, got 0"),
        ({"density": True}, "density must be"),
        ({"density": 0.3, "dense_steps": 0.3}, "dense_steps must be a share from 0 to less than"),
        ({"height": 0}, "height must be a whole number >= 1, got 0"),
        ({"num_frames": 4.0}, "num_frames must be a whole number"),
        ({"call": {"bogus": 1}}, "WanPipeline takes no bogus"),
    ],
)
def test_what_can_not_be_is_said(options, words):
    with pytest.raises(ValueError, match=words):
        geometric_plan(wan()[0], **options)


def test_a_pipeline_that_needs_an_image_says_so():
    pipe, _ = PIPELINES["wan_i2v"]()
    with pytest.raises(ValueError, match="can't be called without image: pass it in call="):
        geometric_plan(pipe)
    with pytest.raises(ValueError, match="alone doesn't tell its token grid"):
        geometric_plan(pipe.transformer)


def test_the_pipeline_is_as_it_was():
    pipe, call = wan()
    before = generate(pipe, call)
    geometric_plan(pipe, call=call)
    assert not pipe.transformer._forward_pre_hooks
    assert torch.equal(generate(pipe, call), before)


def test_weightless_transformers_take_no_memory_and_keep_their_identity():
    (transformer,) = weightless(TINY).values()
    assert {w.untyped_storage().nbytes() for w in transformer.parameters()} == {4}
    (part,) = Plan.from_pretrained("tiny-wan").components.values()
    assert config_hash(transformer.config) == part.config_hash


def test_the_command_writes_a_plan_that_says_what_it_is(tmp_path, capsys):
    file = tmp_path / "plan.json"
    command = ["plan", TINY, *SIZE, "--density", "0.6", "--out", str(file)]
    assert cli.run(command) == 0
    assert "uncalibrated" in capsys.readouterr().out
    plan = Plan.load(file)
    assert plan.components["transformer"].layout == TokenLayout.video(4, 8, 8)
    assert cli.run(["show", str(file)]) == 0
    assert NOTE in capsys.readouterr().out
    assert cli.run(command) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.run([*command, "--force"]) == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--density", "1.5"], "--density must be"),
        (["--dense-steps", "0.9"], "--dense-steps must be a share from 0 to less than the --density"),
        (["--num-frames", "0"], "--num-frames must be a whole number >= 1"),
        (["--out", "plan"], "--out must name a file that ends in .json"),
    ],
)  # fmt: skip
def test_the_command_refuses_before_it_loads(more, words, capsys, monkeypatch):
    monkeypatch.setattr("sparse_dit.inputs.load_pipeline", never)
    assert cli.run(["plan", TINY, *SIZE, *more]) == 2
    assert words in capsys.readouterr().err


def test_a_command_without_a_size_says_what_is_missing(capsys):
    assert cli.run(["plan", TINY, "--height", "64"]) == 2
    assert "give --width" in capsys.readouterr().err


def test_search_shows_its_real_parameters():
    shown = inspect.signature(sparse_dit.search).parameters
    assert shown == inspect.signature(sparse_dit.search.search_plan).parameters
    assert inspect.signature(sparse_dit.search.search).return_annotation is Plan
    assert {"settings", "min_psnr", "report"} < shown.keys()
    with pytest.raises(ValueError, match="give one of"):
        sparse_dit.search(wan()[0], ["a", "b"], settings=GenerationSettings(64, 64))


def test_search_is_one_package_however_it_is_imported():
    from sparse_dit import search
    from sparse_dit.search import search_plan

    assert search is sparse_dit.search is importlib.import_module("sparse_dit.search")
    assert search.search_plan is search_plan  # pyright: ignore[reportFunctionMemberAccess]
    assert callable(search)
    assert {"search", "geometric_plan"} <= set(dir(sparse_dit))
    assert sparse_dit.geometric_plan is geometric_plan
    assert not hasattr(sparse_dit, "bogus")
