"""Heads that are computed at some steps alone."""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from sparse_dit.attention import sparse_attention
from sparse_dit.call import AttentionCall, StepContext
from sparse_dit.index import build_index
from sparse_dit.integrations.step_tracker import StepTracker
from sparse_dit.layout import TokenLayout
from sparse_dit.patch import patch, unpatch
from sparse_dit.patterns import Dense, Pattern, Skip, Window
from sparse_dit.plan import ComponentPlan, HeadChoice, Stage
from sparse_dit.reuse import Reuse, without
from sparse_dit.runtime import Runtime
from tests.helpers.tiny_pipelines import generate, wan
from tests.integrations.test_combinations import TECHNIQUES
from tests.integrations.test_combinations import fresh as fresh_pipeline
from tests.test_patch import plan_for

LAYOUT = TokenLayout.video(2, 4, 4, text_after=3)
NEAR = Pattern(Window(frames=0, rows=1), (1, 2, 2), far=True)
DENSE = Pattern(Dense())
HALF, THIRD = replace(NEAR, every=2), replace(DENSE, every=3)
LAYER = "blocks.0.attn1"


WHOLE = (Stage(1.0, 0.0),)


def component(*patterns, stages=WHOLE, layers=(LAYER,)):
    heads = tuple(HeadChoice(pattern) for pattern in patterns)
    table = {layer: (heads,) * len(stages) for layer in layers}
    return ComponentPlan(
        "Model", "0" * 64, dict.fromkeys(layers, (len(heads), 8)), LAYOUT, stages, table
    )


def call_at(step, seed=None, *, run=0, branch="cond", condition=0, batch=1, heads=3, **changes):
    """A call with tensors of its own at one step; sigma falls by .1 a step."""
    generator = torch.Generator().manual_seed(step if seed is None else seed)
    q, k, v = torch.randn(3, batch, LAYOUT.seq_len, heads, 8, generator=generator)
    context = StepContext(LAYOUT, 1 - 0.1 * step, branch, run, step, condition)
    stock = changes.pop("stock", lambda: dense(q, k, v))
    fields = {"layer": LAYER, "attn_mask": None, "kv_len": None, "scale": None, "unsupported": None}
    return AttentionCall(q=q, k=k, v=v, context=context, stock=stock, **(fields | changes))


def dense(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def fresh(call, *patterns):
    """What the patterns give if every head is computed, `[B, N, H, D]`."""
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    return sparse_attention(q, k, v, build_index(patterns, LAYOUT)).transpose(1, 2)


def is_computed(runtime, call, *patterns):
    """For each head whether the call's output is its own; bit for bit."""
    out, own = runtime(call), fresh(call, *patterns)
    return [torch.equal(out[:, :, head], own[:, :, head]) for head in range(out.shape[2])]


def test_heads_are_computed_at_every_nth_step_and_taken_again_between():
    patterns = (NEAR, HALF, THIRD)
    runtime = Runtime("transformer", component(*patterns), "auto")
    calls = [call_at(step) for step in range(7)]
    own = [fresh(call, *patterns) for call in calls]
    for step, call in enumerate(calls):
        out = runtime(call)
        for head, every in enumerate((1, 2, 3)):
            source = step // every * every
            assert torch.equal(out[:, :, head], own[source][:, :, head]), (step, head)


def test_density_counts_what_was_computed():
    patterns = (NEAR, HALF, THIRD)
    runtime = Runtime("transformer", component(*patterns), "auto")
    near = build_index([NEAR], LAYOUT).density
    for step in range(6):
        runtime(call_at(step))
    pairs = sum(ran.pairs for ran in runtime.ran)
    computed = sum(ran.computed for ran in runtime.ran)
    assert computed / pairs == pytest.approx((near + near / 2 + 1 / 3) / 3)


def test_a_step_at_which_nothing_is_computed():
    runtime = Runtime("transformer", component(HALF, HALF, HALF), "auto")
    first, second = call_at(0), call_at(1)
    out = runtime(first)
    assert torch.equal(out, fresh(first, HALF, HALF, HALF))
    assert torch.equal(runtime(second), out)
    assert sum(r.computed for r in runtime.ran) == pytest.approx(
        sum(r.pairs for r in runtime.ran) * build_index([NEAR], LAYOUT).density / 2
    )


def test_a_layer_that_is_dense_where_it_is_computed():
    halved = Pattern(Dense(), every=2)
    runtime = Runtime("transformer", component(DENSE, halved, halved), "auto")
    first, second = call_at(0), call_at(1)
    assert torch.equal(runtime(first), first.stock())
    out = runtime(second)
    assert torch.equal(out[:, :, 1:], first.stock()[:, :, 1:])
    assert torch.allclose(out[:, :, :1], second.stock()[:, :, :1], atol=1e-5)


OTHERS = {
    "another run": {"run": 1},
    "another condition": {"condition": 1},
    "no condition": {"condition": None},
    "another branch": {"branch": "uncond"},
    "another batch": {"batch": 2},
    "another layer": {"layer": "blocks.1.attn1"},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_nothing_is_taken_for(changes):
    patterns = (NEAR, HALF, THIRD)
    plan = component(*patterns, layers=(LAYER, "blocks.1.attn1"))
    runtime = Runtime("transformer", plan, "auto")
    runtime(call_at(0))
    assert is_computed(runtime, call_at(1, **changes), *patterns) == [True] * 3


def test_nothing_is_taken_over_skipped_steps_or_rising_noise():
    patterns = (NEAR, HALF, THIRD)
    runtime = Runtime("transformer", component(*patterns), "auto")
    runtime(call_at(0))
    assert is_computed(runtime, call_at(2), *patterns) == [True, True, False]  # 2 of 3 steps old
    assert is_computed(runtime, call_at(5), *patterns) == [True] * 3
    again = call_at(6)
    again.context = replace(again.context, sigma=0.51)
    assert is_computed(runtime, again, *patterns) == [True] * 3


def test_a_new_stage_starts_anew():
    stages = (Stage(1.0, 0.85), Stage(0.85, 0.0))
    runtime = Runtime("transformer", component(NEAR, HALF, THIRD, stages=stages), "auto")
    got = [is_computed(runtime, call_at(step), NEAR, HALF, THIRD) for step in range(5)]
    assert [row[1] for row in got] == [True, False, True, False, True]  # stage 1 from step 2 on
    assert [row[2] for row in got] == [True, False, True, False, False]


def test_another_size_is_computed():
    runtime = Runtime("transformer", component(NEAR, HALF, THIRD), "auto")
    runtime(call_at(0))
    call = call_at(1)
    turned = TokenLayout.video(4, 2, 4, text_after=3)  # as many tokens
    call.context = replace(call.context, layout=turned)
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    own = sparse_attention(q, k, v, build_index([NEAR, HALF, THIRD], turned)).transpose(1, 2)
    assert torch.equal(runtime(call), own)


def test_two_forwards_of_a_step_that_look_alike_are_never_mixed():
    patterns = (NEAR, HALF, THIRD)
    runtime = Runtime("transformer", component(*patterns), "auto")
    assert is_computed(runtime, call_at(0), *patterns) == [True] * 3
    assert is_computed(runtime, call_at(1), *patterns) == [True, False, False]
    assert is_computed(runtime, call_at(1, seed=50), *patterns) == [True] * 3
    for step in (2, 3, 4):
        for seed in (step, 50 + step):
            assert is_computed(runtime, call_at(step, seed), *patterns) == [True] * 3


def test_with_gradients_all_is_computed():
    halved = Pattern(Dense(), every=2)
    runtime = Runtime("transformer", component(halved, halved, halved), "auto")
    for step in (0, 1):
        call = call_at(step)
        call.q.requires_grad_()
        runtime(call).sum().backward()
        assert (call.q.grad.abs().sum((0, 1, 3)) > 0).all()


def test_memory_is_what_is_said_and_is_given_back():
    runtime = Runtime("transformer", component(NEAR, HALF, THIRD), "auto")
    head = 2 * LAYOUT.seq_len * 8 * 4
    held = []
    for step in range(4):
        for branch, condition in (("cond", 0), ("uncond", 1)):
            runtime(call_at(step, branch=branch, condition=condition, batch=2))
        held.append(runtime._reuse.num_bytes)
    assert held == [4 * head, 2 * head, 2 * head, 2 * head]
    runtime.forget()
    assert runtime._reuse.num_bytes == 0


def test_a_copy_holds_nothing():
    patterns = (NEAR, HALF, THIRD)
    runtime = Runtime("transformer", component(*patterns), "auto")
    runtime(call_at(0))
    for other in (copy.deepcopy(runtime), pickle.loads(pickle.dumps(runtime))):
        assert is_computed(other, call_at(1), *patterns) == [True] * 3
    assert is_computed(runtime, call_at(1), *patterns) == [True, False, False]


@pytest.mark.parametrize("backend", ["reference", "gather", "cpu"])
def test_heads_without_work_are_zero_in_every_backend(backend):
    index = build_index([NEAR, DENSE, Pattern(Skip(), far=True)], LAYOUT)
    call = call_at(0)
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    whole = sparse_attention(q, k, v, index, backend=backend)
    for heads in ((0,), (1, 2), (0, 1, 2)):
        out = sparse_attention(q, k, v, without(index, heads), backend=backend)
        for head in range(3):
            wanted = torch.zeros_like(whole[:, head]) if head in heads else whole[:, head]
            assert torch.allclose(out[:, head], wanted, atol=1e-6)
        assert without(index, heads).head_density[list(heads)].sum() == 0


def test_conditions_are_numbered_by_object():
    tracker, a, b = StepTracker(), torch.zeros(2), torch.zeros(2)
    numbers = [tracker.condition({"encoder_hidden_states": x}) for x in (a, b, a, b)]
    assert numbers == [0, 1, 0, 1]
    del a
    gc.collect()
    assert tracker.condition({"encoder_hidden_states": torch.zeros(2)}) == 2
    assert tracker.condition({}) is None
    assert copy.deepcopy(tracker).condition({"encoder_hidden_states": b}) == 0


# --- whole pipelines


def sparse_steps(pipe, call, plan, steps, **changes):
    """The output of a patched generation, and its density."""
    with patch(pipe, plan) as handle:
        out = generate(pipe, call | {"num_inference_steps": steps} | changes)
        density = handle.summary().density
    return out, density


def test_a_pipeline_reuses_within_a_run_and_repeats_itself():
    pipe, call = wan()
    whole, full = sparse_steps(pipe, call, plan_for(pipe, NEAR), 4)
    plan = plan_for(pipe, HALF, NEAR)
    with patch(pipe, plan) as handle:
        one = generate(pipe, call | {"num_inference_steps": 4})
        density = handle.summary().density
        two = generate(pipe, call | {"num_inference_steps": 4})
        held = [runtime._reuse.num_bytes for runtime in handle._runtimes.values()]
    assert torch.equal(one, two)
    assert not torch.equal(one, whole)
    assert density < full and held == [0]
    assert density == pytest.approx(full * 0.75)


def test_generations_that_take_turns_on_one_transformer_do_not_mix():
    """Another prompt's generation at every step of the first one, then the same as alone."""
    pipe, call = wan()
    plan = plan_for(pipe, HALF)
    always = plan_for(pipe, NEAR)
    computed, _ = sparse_steps(pipe, call, always, 4)
    alone, _ = sparse_steps(pipe, call, plan, 4)
    other = call | {"prompt": "a quiet harbour", "num_inference_steps": 2}

    def between(pipe, step, timestep, tensors):
        generate(inner, other)
        return tensors

    inner = type(pipe)(**pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)})
    with patch(pipe, plan):
        mixed = generate(pipe, call | {"num_inference_steps": 4, "callback_on_step_end": between})
    assert torch.equal(mixed, computed), "each step follows another run, so all are computed"
    assert not torch.equal(alone, computed)


def test_unpatch_drops_what_is_kept():
    pipe, call = wan()
    handle = patch(pipe, plan_for(pipe, HALF))
    generate(pipe, call | {"num_inference_steps": 3})
    (runtime,) = handle._runtimes.values()
    assert runtime._reuse.num_bytes > 0
    unpatch(pipe)
    assert runtime._reuse.num_bytes == 0


TRIED = (
    *("bfloat16", "group offload, blocks", "group offload, leaves", "model offload"),
    *("sequential offload", "pyramid attention broadcast", "first block cache", "MagCache"),
    *("TaylorSeer", "faster cache, distilled"),
)


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
@pytest.mark.parametrize("name", TRIED)
def test_beside_offloading_and_caches_nothing_old_is_taken(name, family, monkeypatch):
    ages = []
    turn = Reuse.turn

    def noted(self, call, stage, patterns):
        result = turn(self, call, stage, patterns)
        if result.taken:
            ages.append(call.context.step - self._kept[result.key][2].step)
        return result

    monkeypatch.setattr(Reuse, "turn", noted)
    pipe, call = fresh_pipeline(family)
    with patch(pipe, plan_for(pipe, HALF, NEAR)):
        TECHNIQUES[name].apply(pipe)
        one = generate(pipe, call)
        del ages[:]
        two = generate(pipe, call)
    assert torch.equal(one, two)
    assert set(ages) <= {1}
    if "cache" not in name.lower() and name not in ("pyramid attention broadcast", "TaylorSeer"):
        assert ages


@pytest.mark.fresh
def test_compiled_blocks_reuse_as_eager_ones():
    pipe, call = wan()
    plan = plan_for(pipe, HALF, NEAR)
    eager, density = sparse_steps(pipe, call, plan, 4)
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    compiled, same = sparse_steps(pipe, call, plan, 4)
    torch._dynamo.reset()
    assert torch.equal(compiled, eager) and same == density


@pytest.mark.fresh
def test_pipelines_in_threads_do_not_mix():
    pipes = [wan(seed=0), wan(seed=1)]
    plans = [plan_for(pipe, HALF) for pipe, _ in pipes]
    want = [sparse_steps(*each, plan, 4)[0] for each, plan in zip(pipes, plans, strict=True)]
    assert not torch.equal(*want)
    with patch(pipes[0][0], plans[0]), patch(pipes[1][0], plans[1]), ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            calls = [(pipe, call | {"num_inference_steps": 4}) for pipe, call in pipes]
            got = pool.map(lambda each: generate(*each), calls)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
