import copy
import functools
import logging
import pickle
from dataclasses import replace

import pytest
import torch

from sparse_dit.index import SparseIndex
from sparse_dit.integrations import diffusers as seam
from sparse_dit.integrations.diffusers import components, heads_of, self_attention_layers
from sparse_dit.layout import TokenLayout
from sparse_dit.patch import patch, unpatch
from sparse_dit.patterns import Dense, Pattern, Skip, Window
from sparse_dit.plan import ComponentPlan, HeadChoice, Plan, PlanError, Stage, config_hash
from sparse_dit.runtime import (
    ALL_DENSE,
    ALL_SEEN,
    MAX_LAYOUTS,
    NOT_COVERED,
    NOT_NAMED,
    UNKNOWN_BRANCH,
    Runtime,
)
from tests.helpers.tiny_pipelines import BUILDERS, generate, wan

FAMILY = pytest.mark.parametrize("family", BUILDERS)
DENSE = Pattern(Dense())
NARROW = Pattern(Window(frames=0, rows=1, columns=1), tile=(1, 2, 2))
FAR = replace(NARROW, far=True)
WHOLE = (Stage(1.0, 0.0),)


@functools.cache
def _built(family):
    pipe, call = BUILDERS[family]()
    return pipe, call, generate(pipe, call)


def plan_for(pipe, *patterns, stages=WHOLE, layers=None, **fields):
    """A plan that gives head h of every layer and stage `patterns[h % len(patterns)]`."""
    parts = {}
    for name, transformer in components(pipe).items():
        config = transformer.config
        sizes = heads_of(transformer)
        names, size = layers or list(sizes), next(iter(sizes.values()))
        heads = tuple(HeadChoice(patterns[h % len(patterns)]) for h in range(size[0]))
        facts = {
            "model_class": type(transformer).__name__,
            "config_hash": config_hash(config),
            "heads": dict.fromkeys(names, size),
        }
        parts[name] = ComponentPlan(
            layout=TokenLayout.video(2, 2, 2),
            stages=tuple(stages),
            layers={n: (heads,) * len(stages) for n in names},
            **(facts | fields),
        )
    return Plan(type(pipe).__name__, parts, 0.4, forecast={"speedup": 1.5})


def drift(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    yield
    for family in BUILDERS if _built.cache_info().currsize else ():
        pipe, _, _ = _built(family)
        assert seam.attachment_of(pipe.transformer) is None


@FAMILY
@pytest.mark.parametrize("pattern", [NARROW, FAR], ids=["mask", "far"])
def test_a_sparse_plan_changes_the_output_a_little_and_removal_none(family, pattern):
    pipe, call, stock = _built(family)
    handle = patch(pipe, plan_for(pipe, pattern))
    sparse = generate(pipe, call)
    again = generate(pipe, call)
    summary = handle.summary()
    handle.remove()
    handle.remove()
    assert torch.equal(sparse, again)
    assert sparse.isfinite().all()
    assert 0 < drift(sparse, stock) < 0.2
    assert summary.dense_calls == 0
    assert summary.density < 1
    assert torch.equal(generate(pipe, call), stock)


@FAMILY
def test_the_sparse_path_computes_dense_attention_where_the_pattern_covers_all(family, monkeypatch):
    pipe, call, stock = _built(family)
    wide = Pattern(Window(frames=99, rows=99, columns=99), tile=(2, 2, 2))
    with patch(pipe, plan_for(pipe, wide)) as handle:
        assert torch.equal(generate(pipe, call), stock)
        assert handle.summary().sparse_calls == 0
    monkeypatch.setattr(SparseIndex, "is_dense", False)
    with patch(pipe, plan_for(pipe, wide)) as handle:
        torch.testing.assert_close(generate(pipe, call), stock, rtol=1e-4, atol=1e-4)
        assert handle.summary().dense_calls == 0


def test_a_forecast_stands_where_it_is_for_what_ran():
    pipe, call, _ = _built("wan")
    plan = plan_for(pipe, NARROW)
    part = replace(plan.components["transformer"], layout=TokenLayout.video(5, 4, 4))
    plan = replace(plan, components={"transformer": part})
    with patch(pipe, plan) as handle:
        assert "forecast: speedup 1.5" in str(handle.summary()), "before anything ran"
        generate(pipe, call)
        assert handle.summary().ran_at == (80,)
        assert "forecast: speedup 1.5" in str(handle.summary())
        generate(pipe, call, height=128)
        assert handle.summary().ran_at == (80, 160)
        words = "forecast at 80 tokens, where it was calibrated (80 to 160 tokens ran): speedup 1.5"
        assert words in str(handle.summary())


def test_nothing_sparse_gets_no_forecast_and_why_is_said():
    """At one frame of 2 x 2 tiles the pattern covers everything; that isn't a dense plan."""
    pipe, call, _ = _built("wan")
    covers = Pattern(Window(frames=1, rows=1, columns=1), tile=(1, 2, 2), far=True)
    plan = replace(plan_for(pipe, covers), forecast={"speedup": 1.5, "note": "of a test"})
    with patch(pipe, plan) as handle:
        generate(pipe, call, num_frames=1)
    summary = handle.summary()
    assert [s.dense_calls for s in summary.stages] == [{ALL_SEEN: 8}]
    text = str(summary)
    assert "no forecast: nothing ran sparse" in text
    assert "1.5" not in text
    assert "note: of a test" in text


@FAMILY
def test_backends_agree_in_a_pipeline(family):
    pipe, call, _ = _built(family)
    results = []
    for backend in ("reference", "gather"):
        with patch(pipe, plan_for(pipe, FAR, DENSE), backend=backend):
            results.append(generate(pipe, call))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@FAMILY
def test_an_all_dense_plan_is_bit_equal_and_counted_as_dense(family):
    pipe, call, stock = _built(family)
    with patch(pipe, plan_for(pipe, DENSE)) as handle:
        assert torch.equal(generate(pipe, call), stock)
    summary = handle.summary()
    assert (summary.sparse_calls, summary.density) == (0, 1.0)
    assert [s.dense_calls for s in summary.stages] == [{ALL_DENSE: summary.dense_calls}]


@FAMILY
def test_prompts_of_different_lengths_several_times_each(family):
    pipe, call, _ = _built(family)
    many = "num_images_per_prompt" if family == "flux" else "num_videos_per_prompt"
    prompts = ["a cat", "a dog runs along the shore of a wide lake in the evening"]
    call = {**call, "prompt": prompts, many: 2}
    if "negative_prompt" in call:
        call["negative_prompt"] = ["", "blurred"]
    stock = generate(pipe, call)
    assert len(stock) == (
        2 if family == "cogvideox" else 4
    )  # the host itself leaves it at one each
    with patch(pipe, plan_for(pipe, DENSE)):
        assert torch.equal(generate(pipe, call), stock)
    with patch(pipe, plan_for(pipe, NARROW)) as handle:
        sparse = generate(pipe, call)
    assert handle.summary().dense_calls == 0
    assert all(0 < drift(a, b) < 0.2 for a, b in zip(sparse, stock, strict=True))


def test_stages_branches_and_layers_outside_the_plan_run_stock_and_the_summary_says_so():
    pipe, call, stock = _built("wan")
    stages = (Stage(1.0, 0.5, "cond"), Stage(0.5, 0.0, "uncond"))
    plan = plan_for(pipe, NARROW, stages=stages, layers=["blocks.1.attn1"])
    with patch(pipe, plan) as handle:
        assert handle.summary().density is None
        sparse = generate(pipe, call)
    assert 0 < drift(sparse, stock) < 0.2
    summary = handle.summary()
    high, low, outside = summary.stages
    # 4 forwards: high cond, high uncond, low cond, low uncond; 2 layers in each
    assert (high.stage, high.sparse_calls, high.dense_calls) == (
        "progress 1 to 0.5, cond",
        1,
        {NOT_NAMED: 1},
    )
    assert (low.stage, low.sparse_calls, low.dense_calls) == (
        "progress 0.5 to 0, uncond",
        1,
        {NOT_NAMED: 1},
    )
    assert (outside.stage, outside.sparse_calls, outside.layers) == ("outside", 0, 2)
    assert outside.dense_calls == {NOT_NAMED: 2, NOT_COVERED: 2}
    assert (summary.sparse_calls, summary.dense_calls) == (2, 6)
    narrow = summary.stages[0]
    assert narrow.density == pytest.approx((0.24 + 1) / 2, abs=0.15)
    assert summary.density == pytest.approx((2 * (2 * narrow.density - 1) + 6) / 8)
    ran = handle.ran["transformer"]
    assert sum(r.calls for r in ran) == 8
    assert {r.layer for r in ran if r.dense_because is None} == {"blocks.1.attn1"}
    (backend,) = summary.backends
    assert {r.backend for r in ran if r.dense_because is None} == {backend}
    assert {r.backend for r in ran if r.dense_because is not None} == {None}
    assert backend in ("cpu", "gather") and f"by the backend {backend}" in str(summary)


def test_the_summary_prints_what_ran():
    pipe, call, _ = _built("wan")
    with patch(pipe, plan_for(pipe, NARROW, stages=(Stage(1.0, 0.5),))) as handle:
        assert "ran 0 sparse and 0 dense attention calls; density - (plan: 40.0%)" in str(
            handle.summary()
        )
        generate(pipe, call)
    text = str(handle.summary())
    assert f"4 ({NOT_COVERED})" in text.replace("\n", " ")
    assert "progress 1 to 0.5" in text
    assert "ran 4 sparse and 4 dense attention calls" in text
    assert "forecast at 8 tokens, where it was calibrated (80 tokens ran): speedup 1.5" in text
    assert "no longer patched" not in text


def test_indices_are_built_once_a_layout_stage_and_layer(monkeypatch):
    import sparse_dit.runtime as runtime

    pipe, call, _ = _built("wan")
    built = []
    original = runtime.build_index
    monkeypatch.setattr(
        runtime, "build_index", lambda *a, **k: built.append(a) or original(*a, **k)
    )
    with patch(pipe, plan_for(pipe, NARROW, stages=(Stage(1.0, 0.5), Stage(0.5, 0.0)))) as handle:
        generate(pipe, call)
        generate(pipe, call)
        assert len(built) == 4
        generate(pipe, call, num_frames=9)
        assert len(built) == 8
        (tap,) = {id(p): p for p in handle._runtimes.values()}.values()
        for frames in range(1, MAX_LAYOUTS + 2):
            generate(pipe, call, num_frames=4 * frames + 1, num_inference_steps=1)
        assert len(tap._indices) == MAX_LAYOUTS


def test_below_break_even_dense_runs_with_one_logged_reason(caplog):
    pipe, call, stock = _built("wan")
    with patch(pipe, plan_for(pipe, NARROW, valid_tokens=(81, None))) as handle:
        assert torch.equal(generate(pipe, call), stock)
    reason = "80 tokens are below the break-even of 81"
    assert [(r.name, r.levelno, r.message) for r in caplog.records] == [
        ("sparse_dit", logging.WARNING, f"transformer runs dense attention: {reason}")
    ]
    assert handle.summary().stages[0].dense_calls == {reason: 8}
    with patch(pipe, plan_for(pipe, NARROW, valid_tokens=(0, 79))) as handle:
        assert torch.equal(generate(pipe, call), stock)
    reason = "80 tokens are more than the 79 that the plan is for"
    assert handle.summary().stages[0].dense_calls == {reason: 8}


def test_what_only_the_host_computes_runs_stock_with_one_logged_reason(caplog):
    pipe, call, stock = _built("cogvideox")
    layers = self_attention_layers(pipe.transformer).values()
    mask = torch.zeros(2, 64)
    hooks = [
        layer.register_forward_pre_hook(
            lambda m, a, k: (a, {**k, "attention_mask": mask}), with_kwargs=True
        )
        for layer in layers
    ]
    with patch(pipe, plan_for(pipe, NARROW)) as handle:
        masked = generate(pipe, call)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(masked, stock)
    assert handle.summary().sparse_calls == 0
    (record,) = caplog.records
    assert record.message.startswith(
        "transformer runs dense attention: the host asked for a dense mask (2, 4, 1, 64)"
    )


def test_no_grid_no_sparse(caplog, monkeypatch):
    pipe, call, stock = _built("flux")
    from sparse_dit.integrations.families import flux

    monkeypatch.setattr(flux, "raster", lambda *_: (0, 0))
    with patch(pipe, plan_for(pipe, NARROW)):
        assert torch.equal(generate(pipe, call), stock)
    (record,) = caplog.records
    assert record.message.endswith("the forward's arguments don't tell the token grid")


def test_a_grid_that_is_not_the_sequence_runs_dense():
    pipe, call, stock = _built("wan")
    with patch(pipe, plan_for(pipe, NARROW)) as handle:
        # a block that is called on half the tokens, as pooling or pruning methods do
        generate(pipe, call)
        block = pipe.transformer.blocks[0].attn1
        with torch.no_grad():
            block(torch.zeros(1, 40, 48))
    reasons = {r.dense_because for r in handle.ran["transformer"]} - {None}
    assert reasons == {"attention over 40 tokens, but the grid 5x4x4 has 80"}
    assert torch.equal(generate(pipe, call), stock)


def test_skipped_heads_and_mixed_heads_run():
    pipe, call, stock = _built("wan")
    with patch(pipe, plan_for(pipe, Pattern(Skip()), DENSE)) as handle:
        mixed = generate(pipe, call)
    assert mixed.isfinite().all()
    assert not torch.equal(mixed, stock)
    assert handle.summary().density == 0.5


def test_a_bare_transformer_can_be_patched():
    pipe, call, stock = _built("wan")
    with patch(pipe.transformer, plan_for(pipe, NARROW)) as handle:
        assert not torch.equal(generate(pipe, call), stock)
    assert handle.summary().sparse_calls == 8
    assert torch.equal(generate(pipe, call), stock)


def test_two_transformers_have_their_own_plans():
    pipe, call = wan(second=True)
    stock = generate(pipe, call)
    plan = plan_for(pipe, NARROW)
    with patch(pipe, plan) as handle:
        generate(pipe, call)
    assert [(s.component, s.sparse_calls) for s in handle.summary().stages] == [
        ("transformer", 4),
        ("transformer_2", 4),
    ]
    one = replace(plan, components={"transformer_2": plan.components["transformer_2"]})
    with patch(pipe, one) as handle:
        assert not torch.equal(generate(pipe, call), stock)
    assert handle.summary().sparse_calls == 4
    assert torch.equal(generate(pipe, call), stock)
    with pytest.raises(ValueError, match=r"patch the pipeline, not one transformer"):
        patch(pipe.transformer, plan)


def test_a_half_failed_patch_leaves_the_pipeline_stock():
    pipe, call = wan(second=True)
    stock = generate(pipe, call)
    layer = pipe.transformer_2.blocks[1].attn1
    processor = layer.processor

    class Linear:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    layer.set_processor(Linear())
    with pytest.raises(TypeError, match="Linear calls no attention function"):
        patch(pipe, plan_for(pipe, NARROW))
    assert all(seam.attachment_of(part) is None for part in components(pipe).values())
    layer.set_processor(processor)
    assert torch.equal(generate(pipe, call), stock)


def test_patched_twice_is_an_error_and_unpatch_is_the_way_out():
    pipe, call, stock = _built("wan")
    plan = plan_for(pipe, NARROW)
    handle = patch(pipe, plan)
    for what in (pipe, pipe.transformer):
        with pytest.raises(
            ValueError,
            match=r"^the pipeline is patched; call handle.remove\(\) or sparse_dit.unpatch\(pipe\)",
        ):
            patch(what, plan)
    unpatch(pipe)
    unpatch(pipe)
    assert torch.equal(generate(pipe, call), stock)
    second = patch(pipe, plan)
    handle.remove()  # of the first patch: nothing to do with the second
    assert not torch.equal(generate(pipe, call), stock)
    second.remove()
    assert torch.equal(generate(pipe, call), stock)


def test_the_context_manager_removes_after_an_exception():
    pipe, call, stock = _built("wan")
    with pytest.raises(RuntimeError, match="user"), patch(pipe, plan_for(pipe, NARROW)):
        raise RuntimeError("user")
    assert torch.equal(generate(pipe, call), stock)


@FAMILY
def test_a_deep_copy_stays_patched_and_unpatch_takes_it_off(family):
    pipe, call, stock = _built(family)
    handle = patch(pipe, plan_for(pipe, FAR))
    sparse = generate(pipe, call)
    calls = handle.summary().sparse_calls
    twin = copy.deepcopy(pipe)
    assert torch.equal(generate(twin, call), sparse)
    assert handle.summary().sparse_calls == calls
    handle.remove()
    assert torch.equal(generate(twin, call), sparse)
    assert torch.equal(generate(pipe, call), stock)
    unpatch(twin)
    assert torch.equal(generate(twin, call), stock)


def test_a_patched_transformer_pickles_with_its_plan():
    pipe, call, stock = _built("wan")
    with patch(pipe, plan_for(pipe, FAR)):
        sparse = generate(pipe, call)
        twin = pickle.loads(pickle.dumps(pipe.transformer))
    original, pipe.transformer = pipe.transformer, twin
    try:
        assert torch.equal(generate(pipe, call), sparse)
        unpatch(pipe)
        assert torch.equal(generate(pipe, call), stock)
    finally:
        pipe.transformer = original


@FAMILY
def test_a_patched_pipeline_saves_as_stock(family, tmp_path):
    pipe, call, stock = _built(family)
    with patch(pipe, plan_for(pipe, NARROW)):
        pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert all(seam.attachment_of(part) is None for part in components(loaded).values())
    torch.testing.assert_close(generate(loaded, call), stock, rtol=1e-3, atol=1e-3)
    with patch(loaded, plan_for(pipe, NARROW)):
        assert generate(loaded, call).isfinite().all()


def test_a_plan_file_patches_like_the_plan(tmp_path):
    pipe, call, _ = _built("wan")
    plan = plan_for(pipe, FAR)
    with patch(pipe, plan):
        want = generate(pipe, call)
    plan.save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "plan.json", str(tmp_path)):
        with patch(pipe, place):
            assert torch.equal(generate(pipe, call), want)


def _other(pipe, **fields):
    return plan_for(pipe, NARROW, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_class": "FluxTransformer2DModel"},
            "class must be FluxTransformer2DModel.*got Wan",
        ),
        (
            {"heads": {f"blocks.{i}.attn1": (2, 32) for i in range(2)}},
            "head_dim must be 32 as in the plan, got 24",
        ),
        ({"layers": ["blocks.30.attn1"]}, "layers must be in the model.*'blocks.30.attn1'"),
        ({"layers": ["blocks.0.attn2"]}, "layers must be in the model.*'blocks.0.attn2'"),
        ({"config_hash": "1" * 64}, "config_hash must be 111111111111.* as in the plan, got"),
    ],
)
def test_a_plan_for_another_model_is_an_error(fields, message):
    pipe, call, stock = _built("wan")
    with pytest.raises(PlanError, match=message):
        patch(pipe, _other(pipe, **fields))
    assert torch.equal(generate(pipe, call), stock)


def test_a_plan_for_another_pipeline_is_an_error():
    pipe, _, _ = _built("wan")
    flux, _, _ = _built("flux")
    with pytest.raises(PlanError, match="class must be FluxTransformer2DModel"):
        patch(pipe, plan_for(flux, NARROW))
    plan = plan_for(pipe, NARROW)
    part = plan.components["transformer"]
    with pytest.raises(ValueError, match=r"components \['transformer_2'\] that WanPipeline lacks"):
        patch(pipe, replace(plan, components={"transformer": part, "transformer_2": part}))


def test_other_wrong_arguments_are_errors():
    pipe, _, _ = _built("wan")
    plan = plan_for(pipe, NARROW)
    with pytest.raises(
        ValueError,
        match=r"unknown backend 'cuda'; expected 'auto' or one of \['block_sparse_attn', 'cpu'",
    ):
        patch(pipe, plan, backend="cuda")
    with pytest.raises(TypeError, match=r"str is no transformer.*; pass a diffusers pipeline"):
        patch("pipe", plan)
    with pytest.raises(TypeError, match=r"plan must be .auto., .exact., a rule.*got dict"):
        patch(pipe, {})  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        PlanError, match="class must be WanTransformer3DModel as in the plan, got UMT5"
    ):
        patch(pipe.text_encoder, plan)
    for component in (pipe.vae, pipe.transformer.blocks[0]):
        with pytest.raises(
            NotImplementedError, match=rf"^{type(component).__name__} is not supported; `sparse-dit"
        ):
            patch(component, plan)
    with pytest.raises(PlanError):
        patch(pipe, "no-such-plan")


def test_layers_lost_to_the_host_are_in_the_summary(caplog):
    pipe, call = BUILDERS["cogvideox"]()
    handle = patch(pipe, plan_for(pipe, NARROW))
    pipe.fuse_qkv_projections()
    generate(pipe, call)
    for _ in range(2):
        assert handle.summary().lost == {
            "transformer": ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
        }
        assert "transformer: no longer patched, not counted: transformer_blocks.0.attn1" in str(
            handle.summary()
        )
        handle.remove()
    assert handle.summary().density is None
    assert len(caplog.records) == 1


def test_a_layer_that_is_replaced_after_patching_is_told_and_one_that_is_cut_off_is_not(caplog):
    pipe, call = wan(num_layers=3)
    blocks = pipe.transformer.blocks
    stock = [block.attn1.processor for block in blocks]
    handle = patch(pipe, plan_for(pipe, NARROW))
    pipe.transformer.blocks = torch.nn.ModuleList([copy.deepcopy(blocks[0]), blocks[1]])
    unpatched = pipe.transformer.blocks[0].attn1
    unpatched.set_processor(stock[0])
    generate(pipe, call)
    assert handle.summary().lost == {"transformer": ("blocks.0.attn1",)}
    assert {r.layer for r in handle.ran["transformer"]} == {"blocks.1.attn1"}
    (record,) = caplog.records
    assert "other blocks?) and run stock: do that first, then patch; ['blocks.0.attn1']" in (
        record.message
    )
    handle.remove()
    assert [block.attn1.processor for block in blocks] == stock
    assert unpatched.processor is stock[0]


def test_a_plan_for_one_branch_on_forwards_of_both_runs_dense_and_says_so(caplog):
    """CogVideoX batches guidance: which half of it is the prompt's, no forward tells."""
    pipe, call, stock = _built("cogvideox")
    halves = (Stage(1.0, 0.0, "cond"), Stage(1.0, 0.0, "uncond"))
    with patch(pipe, plan_for(pipe, NARROW, stages=halves)) as handle:
        assert torch.equal(generate(pipe, call), stock)
    assert handle.summary().stages[-1].dense_calls == {UNKNOWN_BRANCH: 4}
    assert [r.message for r in caplog.records] == [
        f"transformer runs dense attention: {UNKNOWN_BRANCH}"
    ]
    one = (Stage(1.0, 0.4, "any"), Stage(0.4, 0.0, "cond"))
    with patch(pipe, plan_for(pipe, NARROW, stages=one)) as handle:
        generate(pipe, call)  # noise levels 0.5 and 0
    ran = {s.stage: (s.sparse_calls, s.dense_calls) for s in handle.summary().stages}
    assert ran["progress 1 to 0.4"] == (2, {})
    assert ran["outside"] == (0, {UNKNOWN_BRANCH: 2})


def test_the_runtime_moves_an_index_once_a_device():
    plan = plan_for(_built("wan")[0], NARROW).components["transformer"]
    runtime = Runtime("transformer", plan, "auto")
    heads = [choice.pattern for choice in plan.layers["blocks.0.attn1"][0]]
    from sparse_dit.index import build_index

    index = build_index(heads, TokenLayout.video(2, 4, 4))
    assert runtime._on(index, torch.device("cpu")) is index
    first, second = (runtime._on(index, torch.device("meta")) for _ in range(2))
    assert first.entries[0] is second.entries[0]
    assert first.entries[0].runs.device.type == "meta"


def test_compiled_transformers_follow_the_plan_in_few_graphs():
    from torch._dynamo.testing import CompileCounter

    pipe, call = wan(num_layers=10)  # more than the recompile limit of 8
    plan = plan_for(pipe, NARROW)
    with patch(pipe, plan):
        want = generate(pipe, call)
    torch._dynamo.reset()
    graphs = CompileCounter()
    with patch(pipe, plan) as handle:
        pipe.transformer.compile_repeated_blocks(backend=graphs)
        torch.testing.assert_close(generate(pipe, call), want)
        assert handle.summary().sparse_calls == 40
    assert graphs.frame_count <= 6
    torch._dynamo.reset()


def test_a_pipeline_whose_transformer_is_wrapped_by_compile_is_patched():
    pipe, call = wan()
    stock = generate(pipe, call)
    with patch(pipe, plan_for(pipe, NARROW)):
        want = generate(pipe, call)
    torch._dynamo.reset()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with patch(pipe, plan_for(pipe, NARROW)) as handle:
        torch.testing.assert_close(generate(pipe, call), want)
        assert handle.summary().sparse_calls == 8
    torch.testing.assert_close(generate(pipe, call), stock)
    torch._dynamo.reset()


def test_a_removed_patch_cannot_be_entered_again():
    pipe, _ = wan()
    handle = patch(pipe, plan_for(pipe, NARROW))
    with handle:
        pass
    with pytest.raises(RuntimeError, match=r"removed already; call sparse_dit.patch\(pipe, plan\)"):
        handle.__enter__()
    handle = patch(pipe, plan_for(pipe, NARROW))
    unpatch(pipe)
    with pytest.raises(RuntimeError, match="removed already"):
        handle.__enter__()


def test_a_transformer_that_is_replaced_after_patching_is_told():
    pipe, call = wan()
    other, first = copy.deepcopy(pipe.transformer), pipe.transformer
    with patch(pipe, plan_for(pipe, NARROW)) as handle:
        assert handle.summary().replaced == ()
        pipe.transformer = torch.compile(first, backend="eager")  # the same one
        assert handle.summary().replaced == ()
        pipe.transformer = other
        generate(pipe, call)
    for summary in (handle.summary(), handle.summary()):
        assert summary.replaced == ("transformer",) and summary.sparse_calls == 0
        assert "another transformer now than the one that was patched" in str(summary)


@pytest.mark.parametrize("part", ["pipeline", "transformer"])
def test_the_class_instead_of_an_instance(part):
    pipe, _ = wan()
    kind = type(pipe if part == "pipeline" else pipe.transformer)
    with pytest.raises(TypeError, match=rf"{kind.__name__} is a class; pass a pipeline or"):
        patch(kind, plan_for(pipe, NARROW))


@pytest.mark.parametrize(("name", "meant"), [("onlin", "online"), ("Exact", "exact"), ("no", None)])
def test_a_name_that_is_nearly_a_rules_is_told_which(name, meant):
    pipe, _ = wan()
    with pytest.raises(PlanError, match=f"no plan '{name}'") as caught:
        patch(pipe, name)
    assert ("did you mean" in str(caught.value)) == (meant is not None)
    if meant:
        assert str(caught.value).endswith(f"did you mean {meant!r}?")
