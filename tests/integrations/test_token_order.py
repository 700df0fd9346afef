"""Tokens sorted once a forward: equal to rounding, or refused with words, and gone with the patch."""

import copy
import functools
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_dit.integrations.diffusers import attachment_of
from sparse_dit.integrations.families.way import Way
from sparse_dit.patch import patch, unpatch
from sparse_dit.patterns import Pattern, Pooled, Window
from sparse_dit.patterns.blockwise import Budget
from tests.helpers import tiny_image_models as image_models
from tests.helpers.tiny_pipelines import BUILDERS, generate, wan
from tests.helpers.tiny_video_pipelines import PIPELINES
from tests.integrations.test_combinations import CASES, drift, fresh, lora
from tests.integrations.test_together import compile_blocks, compile_whole, wrap_whole
from tests.test_patch import DENSE, plan_for
from tests.test_step_cache import FIRST_BLOCK, TAYLORSEER

pytestmark = [
    # hosts' own: schedulers that give numpy a tensor, FasterCache's call, Mochi's
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
]
SHARED = Pattern(Window(frames=0, rows=1, columns=1), tile=(1, 3, 3))  # ragged in all grids here
OTHER = Pattern(Window(frames=1, rows=1, columns=1), tile=(2, 2, 2), far=True)
MIXING = replace(SHARED, tile=(2, 3, 3))
SORTED = (
    *BUILDERS,
    *("wan_i2v", "wan_ti2v", "chronoedit", "cogvideox_i2v", "hunyuan_i2v", "hunyuan15"),
    *("ltx_condition", "minimax_h3", "flux2", "qwen"),
)
ROTARY = {"rope", "pos_embed", "image_rotary_emb", "img_ids"}
ROUNDING = 2e-6


@functools.cache
def _built(name):
    pipe, call = (BUILDERS | PIPELINES | image_models.BUILDERS)[name]()
    return pipe, call, generate(pipe, call)


def _too_short(pipe, pattern=SHARED):
    """A plan with tiles whose calls all run dense."""
    return plan_for(pipe, pattern, valid_tokens=(1 << 20, None))


def _run(pipe, call, plan, **options):
    with patch(pipe, plan, **options) as handle:
        out = generate(pipe, call)
    return out, handle.summary()


def _forwards(summary):
    """Forwards of a generation whose calls all ran dense, from the calls of one layer."""
    [layers] = {row.layers for row in summary.stages if row.layers}
    return summary.dense_calls // layers


@pytest.mark.parametrize("name", SORTED)
def test_a_forward_of_sorted_tokens_equals_one_of_the_models_order(name):
    pipe, call, stock = _built(name)
    dense, summary = _run(pipe, call, _too_short(pipe), token_order="plan")
    assert 0 < drift(dense, stock) < ROUNDING
    forwards = _forwards(summary)
    assert f"tokens sorted once a forward ({forwards}x), by tiles of 1x3x3" in str(summary)
    plan = plan_for(pipe, SHARED, SHARED, OTHER, replace(SHARED, every=2))
    want, plain = _run(pipe, call, plan)
    got, summary = _run(pipe, call, plan, token_order="plan")
    assert drift(want, stock) > 1e-4
    assert drift(got, want) < ROUNDING
    assert (summary.sparse_calls, summary.density) == (plain.sparse_calls, plain.density)
    assert "tokens sorted" in str(summary)
    assert "tokens" not in " ".join(plain.notes)
    assert torch.equal(generate(pipe, call), stock)


@pytest.mark.parametrize("name", SORTED)
def test_without_the_rotary_embedding_it_would_be_another_output(name, monkeypatch):
    pipe, call, stock = _built(name)
    points = Way.points

    def others(way, transformer):
        return [p for p in points(way, transformer) if not {p.module, p.what} & ROTARY]

    monkeypatch.setattr(Way, "points", others)
    wrong, _ = _run(pipe, call, _too_short(pipe), token_order="plan")
    assert drift(wrong, stock) > 100 * ROUNDING


def test_control_residuals_are_sorted_along():
    pipe, call, _ = _built("flux")
    seen = {}

    def keep(module, args, kwargs):
        seen.update(kwargs)

    hook = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    generate(pipe, call)
    hook.remove()
    tokens, width = seen["hidden_states"].shape[1], pipe.transformer.inner_dim
    noise = torch.randn(2, 1, tokens, width, generator=torch.Generator().manual_seed(0))
    given = {**seen, "return_dict": False}
    given |= {"controlnet_block_samples": [noise[0]], "controlnet_single_block_samples": [noise[1]]}
    with torch.no_grad():
        stock = pipe.transformer(**given)[0]
        with patch(pipe, _too_short(pipe), token_order="plan") as handle:
            assert drift(pipe.transformer(**given)[0], stock) < ROUNDING
            assert "tokens sorted" in str(handle.summary())
        without = pipe.transformer(**seen)[0]
    assert drift(without, stock) > 1e-2


REFUSED = {
    "mochi": "MochiTransformer3DModel: where its tokens enter and leave isn't known",
    "wan_vace": "a control video in the model's own order is added in its layers",
    "wan_animate": "its layers add a face to the tokens of each frame",
    "skyreels_forcing": "its layers may have a mask in the order of frames",
    "hunyuan_i2v": "the model takes the first tokens for a frame, and tiles of 2x3x3 mix frames",
    "ltx_long": "the forward's timestep has other tokens than 4x8x8",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cant_be_sorted_runs_in_its_own_order_and_says_why(name, caplog):
    pipe, call, stock = _built(name)
    with caplog.at_level(logging.WARNING, logger="sparse_dit"):
        out, summary = _run(pipe, call, _too_short(pipe, MIXING), token_order="plan")
    assert torch.equal(out, stock)
    assert REFUSED[name] in str(summary)
    assert "tokens in the model's own order" in str(summary)
    assert "tokens sorted" not in str(summary)
    logged = [r.message for r in caplog.records if REFUSED[name] in r.message]
    assert len(logged) == len(set(logged)) > 0  # once each, not once a forward
    plan = plan_for(pipe, MIXING)
    assert torch.equal(_run(pipe, call, plan, token_order="plan")[0], _run(pipe, call, plan)[0])


def test_plans_without_a_tile_and_models_in_parallel_are_refused(monkeypatch):
    pipe, call, stock = _built("wan")
    online = Pattern(Pooled(Budget(beta=0.5, least=1)), tile=(1, 2, 2))
    for pattern, why in (
        (DENSE, "no head of the plan is sparse"),
        (online, "heads that find their blocks while generating sort tokens themselves"),
    ):
        plan = plan_for(pipe, pattern)
        got, summary = _run(pipe, call, plan, token_order="plan")
        assert why in str(summary)
        assert torch.equal(got, _run(pipe, call, plan)[0])
    with monkeypatch.context() as parallel:
        parallel.setattr(pipe.transformer, "_parallel_config", object())
        out, summary = _run(pipe, call, _too_short(pipe), token_order="plan")
        assert torch.equal(out, stock)
        assert "the model runs in parallel" in str(summary)
    derived = type("Derived", (type(pipe.transformer),), {})
    monkeypatch.setattr(pipe.transformer, "__class__", derived)
    out, summary = _run(pipe, call, _too_short(pipe), token_order="plan")
    assert torch.equal(out, stock)
    assert "Derived is a class of its own, whose forward may do more" in str(summary)


def test_what_has_no_plan_or_no_such_order_is_an_error():
    pipe, _, _ = _built("wan")
    with pytest.raises(ValueError, match=r"token_order must be one of .*, got 'tile'"):
        patch(pipe, plan_for(pipe, SHARED), token_order="tile")
    for name in ("exact", "auto"):
        with pytest.raises(ValueError, match=f"'{name}' has no tiles to sort by"):
            patch(pipe, name, token_order="plan")
    assert attachment_of(pipe.transformer) is None


@pytest.mark.parametrize(
    ("technique", "family"), [case for case in CASES if case.values[1] in SORTED]
)
def test_a_technique_before_and_after_a_patch_that_sorts(technique, family):
    """Step caches hold what lies between the hooks, so it is in one order; a LoRA replaces modules."""
    pipe, call = fresh(family)
    plan = _too_short(pipe)
    with patch(pipe, plan, token_order="plan") as handle:
        technique.apply(pipe)
        late = generate(pipe, call)
        assert "tokens sorted" in str(handle.summary())
    alone = generate(pipe, call)
    early, _ = _run(pipe, call, plan, token_order="plan")
    assert drift(early, alone) < (ROUNDING if alone.dtype == torch.float32 else 2e-2)
    assert torch.equal(late, early)
    assert torch.equal(generate(pipe, call), alone)


@pytest.mark.parametrize("cache", [FIRST_BLOCK, TAYLORSEER], ids=str)
def test_a_plans_step_cache_is_in_the_plans_order(cache):
    pipe, call = wan()
    call["num_inference_steps"] = 5
    provenance = {"step_cache": cache.to_dict(), "settings": {"steps": 5}}
    plan = replace(plan_for(pipe, SHARED, OTHER), provenance=provenance)
    want, plain = _run(pipe, call, plan)
    got, summary = _run(pipe, call, plan, token_order="plan")
    assert drift(got, want) < ROUNDING
    assert summary.sparse_calls == plain.sparse_calls < 2 * 2 * 5  # layers, branches and steps


def test_a_lora_that_wraps_where_tokens_leave_is_put_back_with_it():
    pipe, call = wan()
    with patch(pipe, _too_short(pipe), token_order="plan"):
        lora(pipe, ("proj_out",))
        got = generate(pipe, call)
    assert drift(got, generate(pipe, call)) < ROUNDING


def test_a_step_cache_forgets_what_lies_in_another_order():
    pipe, call = fresh("wan")
    [cached] = [p.values[0] for p in CASES if p.id == "first block cache-wan"]
    cached.apply(pipe)
    handle = None

    def at_the_second(pipe, step, timestep, kwargs):
        if step == 1:
            handle.remove() if handle else pipe.transformer._reset_stateful_cache()
        return kwargs

    want = generate(pipe, call, callback_on_step_end=at_the_second)
    handle = patch(pipe, _too_short(pipe), token_order="plan")
    assert drift(generate(pipe, call, callback_on_step_end=at_the_second), want) < ROUNDING
    assert "tokens sorted once a forward (4x)" in str(handle.summary())


def test_a_forward_that_leaves_places_out_is_an_error(monkeypatch):
    """As one that takes what the blocks gave from the step before, which would lie in another order."""
    pipe, call = wan()
    stock = generate(pipe, call)
    first = pipe.transformer.blocks[0]
    with patch(pipe, _too_short(pipe), token_order="plan"):
        monkeypatch.setattr(type(pipe.transformer.blocks), "__iter__", lambda blocks: iter(()))
        with pytest.raises(RuntimeError, match=r"but left out \['blocks.0'\]: is the forward"):
            generate(pipe, call)
        monkeypatch.undo()
        with monkeypatch.context() as broken:
            broken.setattr(first, "forward", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):  # the forward's own error, not one of ours
                generate(pipe, call)
        assert drift(generate(pipe, call), stock) < ROUNDING
    assert torch.equal(generate(pipe, call), stock)


@pytest.mark.fresh
def test_copies_sort_for_themselves():
    pipe, call = wan()
    plan = plan_for(pipe, SHARED, OTHER)
    with patch(pipe, plan):
        want = generate(pipe, call)
    handle = patch(pipe, plan, token_order="plan")
    twin = copy.deepcopy(pipe)
    loaded = pickle.loads(pickle.dumps(pipe.transformer))
    for transformer in (twin.transformer, loaded):
        other = copy.copy(pipe)
        other.transformer = transformer
        other.register_modules(transformer=transformer)
        assert drift(generate(other, call), want) < ROUNDING
        assert "(4x)" in attachment_of(transformer).token_order[0]
    assert not handle.summary().sparse_calls
    unpatch(twin)
    handle.remove()
    assert torch.equal(generate(twin, call), generate(pipe, call))


def test_two_pipelines_sort_in_two_threads():
    pairs = [wan(), BUILDERS["hunyuan_video"]()]
    wanted, handles = [], []
    for pipe, call in pairs:
        plan = plan_for(pipe, SHARED, OTHER)
        wanted.append(_run(pipe, call, plan)[0])
        handles.append(patch(pipe, plan, token_order="plan"))
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(generate, *pair) for pair in pairs for _ in range(1)]
        for job, want in zip(jobs, wanted, strict=True):
            assert drift(job.result(), want) < ROUNDING


@pytest.fixture
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("how", [compile_blocks, compile_whole, wrap_whole])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_sort_too(how, backend):
    """One graph; of blocks two, as the first one has a hook."""
    pipe, call = wan(num_layers=10)
    plan = plan_for(pipe, SHARED, OTHER)
    want, _ = _run(pipe, call, plan)
    handle = patch(pipe, plan, token_order="plan")
    counter = CompileCounterWithBackend(backend)
    how(pipe, counter)
    for runs in (1, 2):
        assert drift(generate(pipe, call), want) < 1e-5
        assert f"({4 * runs}x)" in str(handle.summary())
    assert counter.frame_count == (2 if how is compile_blocks else 1)
    handle.remove()


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("how", [compile_whole, wrap_whole])
def test_a_graph_without_the_hooks_is_noticed(how):
    """torch doesn't compile a forward anew for hooks that are new in it."""
    pipe, call = wan()
    how(pipe, "eager")
    plan = plan_for(pipe, SHARED, OTHER)
    want, _ = _run(pipe, call, plan)
    with patch(pipe, plan, token_order="plan"):
        with pytest.raises(
            RuntimeError, match=r"compiled whole before this patch\? Then call torch"
        ):
            generate(pipe, call)
        torch._dynamo.reset()
        assert drift(generate(pipe, call), want) < ROUNDING
