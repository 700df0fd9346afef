"""The search on every kind of supported model: texts of any length, masks, tiny searches end to end."""

import math
from dataclasses import replace

import pytest
import torch

from sparse_dit.call import AttentionCall, StepContext
from sparse_dit.eval import heads as quality
from sparse_dit.eval.baselines import METHODS, plan_at, score_baselines
from sparse_dit.eval.baselines import scores as baselines
from sparse_dit.generation import Case
from sparse_dit.index import build_index
from sparse_dit.integrations import workload
from sparse_dit.integrations.diffusers import attach, attachment_of
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Skip
from sparse_dit.runtime import PLANNED, Runtime
from sparse_dit.search import search_plan
from sparse_dit.search.cells import cell_table, sample_rows
from sparse_dit.search.check import check_plan
from sparse_dit.search.profile_file import write_profile
from sparse_dit.search.profiling import Phase, profile_pipeline, run_phase, started
from sparse_dit.search.sampling import attention_over, exact_rows, sampled_heads, whole_layout
from sparse_dit.search.shares import merge_profiles
from tests.helpers import (
    tiny_image_models,
    tiny_image_transformers,
    tiny_pipelines,
    tiny_video_models,
)
from tests.helpers.prompted import cut, prompted, settings_of
from tests.helpers.search_cases import accounts, stub_costs
from tests.helpers.tiny_video_pipelines import PIPELINES as VIDEO_PIPELINES

pytestmark = [
    # the host's own Chroma imports it from there
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast"),  # Mochi asks for float32
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # hosts give numpy tensors
]
PROMPTS = ("a cat plays the piano", "a dog")
HELD_OUT = "a red circle moves left slowly"
SHORT, LONG = Case("a cat", 1), Case("a dog on the shore of a lake", 2)
ROWS = 1000  # all of them


class _Compared:
    """An intercept that compares what is recorded of sampled rows with what stock attention gives."""

    def __init__(self):
        self.calls, self.worst, self.skipped = 0, 0.0, 0

    def __call__(self, call):
        out, layout = call.stock(), whole_layout(call)
        if layout is None:
            self.skipped += 1
            return out
        rows = sample_rows(layout, 8, torch.Generator().manual_seed(0))
        table = cell_table(layout, (1, 8, 8))
        for number, (head, sampled) in enumerate(sampled_heads(call, layout, rows, None)):
            item = number // call.q.shape[2]
            wanted = out[item, rows, head]
            error = (sampled.by_cells(table).out[0] - wanted).norm() / wanted.norm()
            self.worst = max(self.worst, float(error))
        self.calls += 1
        return out


def _forward(name):
    """Runs a transformer alone, as its pipeline would."""
    if name in tiny_video_models.BUILDERS:
        transformer, calls = tiny_video_models.BUILDERS[name]()
        return transformer, lambda: tiny_video_models.run(transformer, calls)
    transformer, arguments = tiny_image_transformers.BUILDERS[name]()
    return transformer, lambda: tiny_video_models.run(transformer, [arguments])


def _built(name):
    """A pipeline and its default call."""
    for builders in (
        tiny_pipelines.BUILDERS,
        tiny_image_models.BUILDERS,
        VIDEO_PIPELINES,
    ):
        if name in builders:
            return builders[name]()
    raise KeyError(name)


def _generation(name):
    """Runs a pipeline with several items where it takes them."""
    pipe, call = _built(name)
    call = {**call, **tiny_image_models.SEVERAL.get(name, {})}
    return pipe.transformer, lambda: tiny_pipelines.generate(pipe, call)


VIDEO = ("mochi", "allegro", "skyreels", "hunyuan15", "wan_vace", "anyflow")  # that take prompts
PIPELINES = [*tiny_pipelines.BUILDERS, *tiny_image_models.BUILDERS, *VIDEO]
TRANSFORMERS = [*tiny_video_models.BUILDERS, *tiny_image_transformers.BUILDERS]


@pytest.mark.parametrize("name", dict.fromkeys([*PIPELINES, *TRANSFORMERS, *VIDEO_PIPELINES]))
def test_sampled_rows_are_what_stock_attention_gives(name):
    transformer, run_it = _forward(name) if name in TRANSFORMERS else _generation(name)
    compared = _Compared()
    attachment = attach(transformer, compared)
    try:
        run_it()
    finally:
        attachment.detach()
    assert compared.calls and not compared.skipped
    assert compared.worst < 1e-4


WITH_TEXT_ENCODERS = tuple(tiny_pipelines.BUILDERS)


def _prompted(name):
    """A pipeline that takes prompts, and settings of a short generation."""
    pipe, call = _built(name)
    texts = None
    if name in WITH_TEXT_ENCODERS:
        texts = lambda prompt: {"prompt": prompt}  # noqa: E731
    elif name == "qwen":
        texts = cut(call)  # its mask is all ones
    elif name in ("sd3", "hidream"):
        texts = cut(call, both=True)  # guidance is batched
    if name in tiny_image_models.BUILDERS:  # four tiles, so that there is a choice
        call = {**call, "height": 2 * call["height"], "width": 2 * call["width"]}
    return prompted(pipe, call, texts), settings_of(call)


def _layouts(pipe, cases, settings):
    """Of the forwards of each case."""
    seen = []

    def note(call):
        seen[-1].add(whole_layout(call))
        return call.stock()

    attachment = attach(pipe.transformer, note)
    try:
        for case in cases:
            seen.append(set())
            workload(pipe, settings).run(case)
    finally:
        attachment.detach()
    return seen


@pytest.mark.parametrize("name", PIPELINES)
def test_a_whole_search(name, monkeypatch, tmp_path):
    stub_costs(monkeypatch)
    pipe, settings = _prompted(name)
    options = {"settings": settings, "profile_steps": 2, "rows": 8, "max_error": 0.4}
    searched = search_plan(pipe, PROMPTS, held_out=[HELD_OUT], **options)
    plan, part = searched.plan, searched.plan.components["transformer"]
    assert 0 < plan.density < 1 and math.isfinite(plan.measured["psnr_db"])
    assert attachment_of(pipe.transformer) is None
    case = Case(HELD_OUT, 7)
    (ran,) = accounts(pipe, plan, case, settings, tmp_path).values()
    reasons = {entry.dense_because for entry in ran}
    assert None in reasons and reasons <= {None, *PLANNED}
    assert {entry.layer for entry in ran} == set(part.layers)
    checked = check_plan(pipe, plan, case, settings, rows=8)
    assert checked.heads and not checked.unseen and not checked.notes
    if name in tiny_image_models.BUILDERS:
        assert part.layout.grid[0] == 1


ANY_LENGTH = ("qwen", "flux2", "sd3", "zimage", "hidream", "lumina")
PADDED = ("hunyuan_video", "mochi", "hunyuan15", "hunyuan_image")
BIASED = ("chroma", "cogview")


@pytest.mark.parametrize("name", ANY_LENGTH)
def test_profiles_of_texts_of_any_length_add_up(name, tmp_path):
    """Each prompt's finding in a file of its own: put together they are what one process finds."""
    pipe, settings = _prompted(name)
    short, long = _layouts(pipe, (SHORT, LONG), settings)
    assert short != long or name == "zimage"  # which pads texts to 32
    files = []
    for number, case in enumerate((LONG, SHORT)):
        alone = started(pipe, settings, 8, [], None)
        run_phase(pipe, alone, Phase("find", case))
        files.append(tmp_path / f"{number}.safetensors")
        write_profile(alone, files[-1])
    whole = started(pipe, settings, 8, [], None)
    for case in (LONG, SHORT):
        run_phase(pipe, whole, Phase("find", case))
    wanted = whole.components["transformer"]
    for order in (files, files[::-1]):
        merged = merge_profiles(order).components["transformer"]
        assert merged.layout == wanted.layout
        assert merged.known_layout.num_global == max(x.num_global for x in short | long)
        for key, found in wanted.found.items():
            assert [*map(list, merged.candidates(*key))] == [*map(list, wanted.candidates(*key))]
            torch.testing.assert_close(merged.found[key], found, rtol=1e-4, atol=1e-6)


class _Exact:
    """An intercept that runs the plan beside stock attention; squared errors of the video's rows."""

    def __init__(self, part):
        self.runtime, self.sums = Runtime("transformer", part, "reference"), {}

    def __call__(self, call):
        out, layout = call.stock(), call.context.layout
        video = sample_rows(layout, ROWS, torch.Generator())
        error = (self.runtime(call) - out)[:, video].square().sum((0, 1, 3))
        both = torch.stack([error, out[:, video].square().sum((0, 1, 3))])
        key = (self.runtime.plan.stage(call.context.sigma, call.context.branch), call.layer)
        self.sums[key] = self.sums.get(key, 0) + both
        return out


@pytest.mark.parametrize("name", [*ANY_LENGTH, *PADDED, *BIASED, "flux"])
def test_what_is_measured_of_heads_is_what_the_plan_computes(name, monkeypatch):
    """By the report, the check and the baselines' scores, of a text that the plan hasn't seen."""
    stub_costs(monkeypatch)
    monkeypatch.setattr(quality, "ROWS", ROWS)
    pipe, settings = _prompted(name)
    options = {"settings": settings, "profile_steps": 2, "rows": 8, "max_error": 0.5}
    searched = search_plan(pipe, PROMPTS, held_out=[HELD_OUT], **options)
    plan, part = searched.plan, searched.plan.components["transformer"]
    exact = _Exact(part)
    attachment = attach(pipe.transformer, exact)
    try:
        workload(pipe, settings).run(LONG)
    finally:
        attachment.detach()
    wanted = {key: (error / norm).sqrt() for key, (error, norm) in exact.sums.items()}
    unprojected = replace(plan, provenance={})  # errors of heads' own outputs
    found = quality.head_quality(pipe, unprojected, LONG, settings)["transformer"]
    assert found.keys() == wanted.keys() and max(e.max() for e in wanted.values()) > 0.01
    for key, totals in found.items():
        measured = totals.relative_error[:, 0].to(wanted[key].dtype)
        torch.testing.assert_close(measured, wanted[key], rtol=1e-3, atol=1e-4)
    for head in check_plan(pipe, unprojected, LONG, settings, rows=ROWS).heads:
        now = wanted[head.stage, head.layer][head.head].item()
        assert head.now == pytest.approx(now, rel=1e-3, abs=1e-4)
    units = {
        (stage, layer, head): [choice.pattern]
        for layer, stages in part.layers.items()
        for stage, heads in enumerate(stages)
        for head, choice in enumerate(heads)
    }
    for listed in units.values():
        if listed[0].is_dense:
            listed[0] = Pattern(Skip(), (1, 8, 8))  # dense ones aren't scored
    monkeypatch.setattr(baselines, "projections", lambda *args: {})
    profile = searched.profile.components["transformer"]
    scored = baselines.score_patterns(pipe, "transformer", profile, units, LONG, settings, ROWS)
    for (stage, layer, head), (pattern,) in units.items():
        if pattern == part.layers[layer][stage][head].pattern:
            now = scored[stage, profile.layers.index(layer), head, 0].sqrt().item()
            assert now == pytest.approx(wanted[stage, layer][head].item(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ["qwen", "chroma", "mochi"])
def test_rivals_have_plans_for_texts_of_any_length(name, monkeypatch):
    stub_costs(monkeypatch)
    pipe, settings = _prompted(name)
    searched = search_plan(
        pipe, PROMPTS, settings=settings, profile_steps=2, rows=8, max_error=0.5,
        tune_on="calibration",
    )  # fmt: skip
    part = searched.profile.components["transformer"]
    scores = score_baselines(pipe, "transformer", part, LONG, settings, rows=8)
    assert scores.error.isfinite().all()
    searched_plan, *others = (
        plan_at(method, searched, scores, 0.85) for method in METHODS if method != "random"
    )
    assert searched_plan is not None and any(others)
    assert all(plan is None or plan.density <= 0.85 for plan in (searched_plan, *others))


def test_a_layer_that_projects_its_mlp_too_is_measured_by_heads_outputs():
    pipe, settings = _prompted("flux2")
    fused = pipe.transformer.single_transformer_blocks[0].attn
    assert fused.to_out.in_features > fused.heads * fused.head_dim
    part = profile_pipeline(pipe, [SHORT], settings, rows=8).components["transformer"]
    assert {layer.split(".")[0] for layer in part.layers} == {
        "transformer_blocks", "single_transformer_blocks",
    }  # fmt: skip
    assert all(scores["norm"].min() > 0 for scores in part.scores.values())


@pytest.mark.parametrize(
    ("kv_heads", "bias"), [(4, False), (4, True), (2, False)], ids=["plain", "bias", "shared"]
)
def test_exact_rows_are_those_of_whole_attention(kv_heads, bias):
    generator = torch.Generator().manual_seed(0)
    layout = TokenLayout.video(2, 4, 5, text_after=3)
    q, k, v = (
        torch.randn(2, layout.seq_len, heads, 8, generator=generator)
        for heads in (4, kv_heads, kv_heads)
    )
    call = AttentionCall(
        "blocks.0.attn1", q, k, v, None, torch.tensor([43, 40]), 0.5, StepContext(layout, 0.5), None,
        lambda: q, bias=torch.randn(2, layout.seq_len, generator=generator) if bias else None,
    )  # fmt: skip
    whole = attention_over(call, build_index([Pattern(Dense())] * 4, layout))
    rows = torch.tensor([0, 7, 31, 42])
    torch.testing.assert_close(exact_rows(call, rows), whole[:, rows], rtol=1e-4, atol=1e-5)
