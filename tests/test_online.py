"""Running without a plan: heads find their blocks while they generate."""

import copy
import itertools
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparse_dit import words
from sparse_dit.attention import sparse_attention
from sparse_dit.curve import Curve
from sparse_dit.estimate import clusters
from sparse_dit.estimate.blocks import (
    Chosen,
    blocks_of,
    entries_of,
    sampled_entry,
    token_orders,
)
from sparse_dit.estimate.blockwise import blockwise_entries
from sparse_dit.estimate.clusters import clustered
from sparse_dit.estimate.orders import SAMPLED, best_orders, stride_of
from sparse_dit.index import SparseIndex, index_of
from sparse_dit.integrations import heads_of
from sparse_dit.integrations.schedule import noise_level
from sparse_dit.layout import TokenLayout
from sparse_dit.online import RULES, online_plan
from sparse_dit.patch import patch
from sparse_dit.patterns import Above, Budget, Cluster, Dense, Mass, Pattern, Pooled, Share, Window
from sparse_dit.plan import Plan, PlanError, Stage
from sparse_dit.runtime import Runtime
from tests.helpers.tiny_language_models import text
from tests.helpers.tiny_pipelines import BUILDERS, generate, wan
from tests.test_reuse import LAYER, LAYOUT, call_at, component, dense

HALF = Budget(beta=0.5, least=1)
SMALL = (1, 2, 2)
POOLED = Pattern(Pooled(HALF, refresh=3), tile=SMALL, far=True)
MASS = Pattern(Mass(HALF), tile=(2, 2, 2), far=True)
OWN = Pattern(Pooled(HALF, own_order=True, dense_above=0.85, refresh=2), tile=SMALL)


def runtime_of(*patterns, **fields):
    return Runtime("transformer", component(*patterns, **fields), "auto")


def estimates_of(runtime):
    """What a runtime keeps."""
    assert isinstance(runtime, Runtime) and runtime._estimates is not None
    return runtime._estimates


def code(place, count):
    return torch.nn.functional.one_hot(place, count).float()


def found_in(call, *patterns):
    """The output of a call whose blocks are those of its own queries and keys."""
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    entries = blockwise_entries(q, k, dict(enumerate(patterns)), LAYOUT, 8**-0.5)
    index = index_of({head: estimate.entry for head, estimate in entries.items()})
    return index, sparse_attention(q, k, v, index).transpose(1, 2)


def test_blocks_are_kept_for_as_many_steps_as_the_shape_says():
    runtime = runtime_of(*[POOLED] * 3)
    first, _ = found_in(call_at(0), *[POOLED] * 3)
    own = kept = None
    for step in range(4):
        call = call_at(step)
        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        own, kept = (
            found_in(call, *[POOLED] * 3)[1],
            sparse_attention(q, k, v, first).transpose(1, 2),
        )
        assert torch.equal(runtime(call), own if step in (0, 3) else kept), step
    assert own is not None and kept is not None and not torch.equal(own, kept)


@pytest.mark.parametrize(
    "change",
    [{"run": 1}, {"branch": "uncond"}, {"condition": 1}, {"batch": 2}, {"layer": "blocks.1.attn1"}],
    ids=str,
)
def test_blocks_of_another_call_are_never_used(change):
    runtime = runtime_of(*[POOLED] * 3, layers=(LAYER, "blocks.1.attn1"))
    runtime(call_at(0))
    call = call_at(1, **change)
    assert torch.equal(runtime(call), found_in(call, *[POOLED] * 3)[1])


def test_a_stage_finds_its_own_blocks_and_an_earlier_step_too():
    stages = (Stage(1.0, 0.75), Stage(0.75, 0.0))
    runtime = runtime_of(*[POOLED] * 3, stages=stages)
    for step in (0, 2, 3, 1):  # sigma 1, .8, .7, .9
        call = call_at(step)
        fresh = torch.equal(runtime(call), found_in(call, *[POOLED] * 3)[1])
        assert fresh == (step != 2)


def test_mass_is_counted_in_a_dense_call_and_kept():
    runtime = runtime_of(*[MASS] * 3)
    call = call_at(0)
    torch.testing.assert_close(runtime(call), dense(call.q, call.k, call.v), rtol=1e-4, atol=1e-5)
    later = call_at(1)
    out = runtime(later)
    assert not torch.allclose(out, dense(later.q, later.k, later.v), atol=1e-3)
    assert torch.equal(runtime(later), out)
    q, k = call.q.transpose(1, 2), call.k.transpose(1, 2)
    p = (q @ k.transpose(2, 3) * 8**-0.5).softmax(-1)[0]
    blocks = blocks_of(MASS, LAYOUT)
    bounds = blocks.bounds.tolist()
    tokens = [blocks.order.order[a:b] for a, b in itertools.pairwise(bounds)]
    best = torch.stack([p[0, tokens[0]][:, t].sum() for t in tokens]).topk(1).indices.tolist()
    entry = entries_of(estimates_of(runtime)._runs[0].kept[LAYER, "cond", 0].seen)[0]
    runs = entry.runs[entry.run_offsets[0] : entry.run_offsets[1]].tolist()
    seen = {key for start, length in runs for key in range(start, start + length)}
    assert all(set(range(bounds[c], bounds[c + 1])) <= seen for c in best)


def test_above_a_noise_level_every_call_is_dense_and_the_last_one_counts():
    pattern = replace(MASS, shape=replace(MASS.shape, dense_above=0.85))
    runtime = runtime_of(*[pattern] * 3)
    for step in range(3):  # sigma 1, .9, .8
        call = call_at(step)
        exact = torch.allclose(runtime(call), dense(call.q, call.k, call.v), atol=1e-4)
        assert exact == (step < 2)
    assert set(estimates_of(runtime)._runs[0].kept[LAYER, "cond", 0].steps.values()) == {1}


def test_each_head_gets_the_token_order_that_errs_the_least():
    layout = TokenLayout.video(8, 16, 16, text_before=0)
    frame, row, column = (x.flatten() for x in torch.meshgrid(
        torch.arange(8), torch.arange(16), torch.arange(16), indexing="ij"))  # fmt: skip
    n = layout.seq_len
    noise = torch.randn(1, 3, n, 16, generator=torch.Generator().manual_seed(0)) * 0.1
    torch.manual_seed(0)
    k = noise.clone()
    k[0, 0] += 4 * code(column, 16)  # looks at its own column in all frames
    k[0, 1] += 4 * code(row, 16)
    q = k * 3
    v = (code(frame, 8) @ torch.randn(8, 16) + code(row, 16) @ torch.randn(16, 16)).expand(
        1, 3, n, 16
    )
    q[0, 2] *= 0.01  # flat: looks at everything alike, and values differ from place to place
    pattern = Pattern(Pooled(Budget(beta=0.1, least=1), own_order=True))
    found = best_orders(q, k, v, dict.fromkeys(range(3), pattern), layout, 0.25)
    orders = [found[head][0] for head in range(3)]
    assert orders == [(None, 8, 1), (None, 1, 8), SAMPLED]
    assert all(tile in token_orders(layout) for tile in orders[:2])
    assert 0 < found[0][1] < 0.1


def test_a_head_has_its_own_order_from_the_first_call_on_that_is_not_dense():
    runtime = runtime_of(*[OWN] * 3)
    for step in range(2):  # sigma 1, .9
        call = call_at(step)
        assert torch.equal(runtime(call), dense(call.q, call.k, call.v)), "stock"
        assert not any(estimates_of(runtime)._runs[0].orders.values())
    runtime(call_at(2))
    orders = estimates_of(runtime)._runs[0].orders
    assert orders[LAYER, LAYOUT].keys() == {0, 1, 2}
    orders[LAYER, LAYOUT] = {0: SAMPLED, 1: (2, 2, 1), 2: SMALL}
    call = call_at(2, branch="uncond")
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    wanted = {1: replace(OWN, tile=(2, 2, 1)), 2: OWN}
    entries = {h: e.entry for h, e in blockwise_entries(q, k, wanted, LAYOUT, 8**-0.5).items()}
    entries[0] = sampled_entry(LAYOUT, stride_of(OWN, LAYOUT))
    index = SparseIndex((entries[0], entries[1], entries[2]), (0, 1, 2))
    assert torch.equal(runtime(call), sparse_attention(q, k, v, index).transpose(1, 2))


@pytest.mark.parametrize("layout", [TokenLayout.video(3, 5, 7, text_before=4), LAYOUT], ids=str)
def test_every_nth_key_stands_for_all(layout):
    entry = sampled_entry(layout, 4)
    text = layout.num_global
    (count,) = {int(n) for n in entry.group_keys} - {layout.seq_len}
    assert count - text == pytest.approx(layout.num_grid / 4, abs=2)
    rows = entry.q_offsets.diff()[entry.group_keys == layout.seq_len].sum()
    assert rows == text, "text sees all"
    assert entry.key_tokens.sort().values.equal(torch.arange(layout.seq_len))
    assert sampled_entry(layout, 1).is_dense


def test_geometry_and_outputs_taken_again_go_along_with_found_blocks():
    near = Pattern(Window(frames=0, rows=1), SMALL)
    again = replace(POOLED, every=2)
    runtime = runtime_of(near, POOLED, again)
    first, second = (runtime(call_at(step)) for step in range(2))
    assert torch.equal(first[:, :, 2], second[:, :, 2])
    assert not torch.equal(first[:, :, 1], second[:, :, 1])
    fixed = runtime_of(*[near] * 3)(call_at(1))
    assert torch.equal(second[:, :, 0], fixed[:, :, 0])


def test_heads_with_nan_are_dense_and_that_is_said_once(caplog):
    runtime = runtime_of(*[POOLED] * 3)
    call = call_at(0)
    call.q[0, 5, 1, 0] = float("nan")
    with caplog.at_level(logging.WARNING):
        out = runtime(call)
        bad = call_at(1, layer=LAYER)
        bad.k[0, 5, 1, 0] = float("inf")
        runtime(bad)
    assert sum("aren't finite" in record.message for record in caplog.records) == 1
    want = dense(call.q, call.k, call.v)
    torch.testing.assert_close(out[:, :, 1], want[:, :, 1], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not torch.allclose(out[:, :, 0], want[:, :, 0], atol=1e-3)
    good = call_at(2)
    assert torch.equal(runtime(good)[:, :, 1], found_in(good, *[POOLED] * 3)[1][:, :, 1])


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("name", RULES)
def test_rules_run_without_a_plan_and_leave_nothing(family, name):
    pipe, call = BUILDERS[family]()
    call = {**call, "num_inference_steps": 4}
    stock = generate(pipe, call)
    with patch(pipe, name) as handle:
        first, again = generate(pipe, call), generate(pipe, call)
        text = str(handle.summary())
    assert torch.equal(first, again) and first.isfinite().all()
    assert f"{name}: blocks are found while generating" in text
    assert torch.equal(generate(pipe, call), stock)


def test_a_rules_plan_is_a_plan(tmp_path):
    pipe, call = wan()
    plan = online_plan(pipe, density=0.4)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path) == plan
    assert plan.density == 0.4 and plan.provenance["rule"] == {"name": "online", "density": 0.4}
    with patch(pipe, "online", density=0.4):
        out = generate(pipe, call)
    with patch(pipe, Plan.load(tmp_path)):
        assert torch.equal(generate(pipe, call), out)


def test_a_copy_starts_with_nothing_found():
    pipe, call = wan()
    with patch(pipe, "online", density=0.3) as handle:
        out = generate(pipe, call)
        other = copy.deepcopy(pipe)
        assert torch.equal(generate(other, call), out)
        (runtime,) = handle._runtimes.values()
        assert estimates_of(runtime)._runs
    assert not estimates_of(runtime)._runs, "removal drops what is kept"


def test_what_is_kept_is_a_bit_for_a_pair_of_blocks():
    runtime = runtime_of(*[POOLED] * 3)
    runtime(call_at(0))
    (kept,) = estimates_of(runtime)._runs[0].kept.values()
    blocks = blocks_of(POOLED, LAYOUT)
    held = [chosen for chosen in kept.seen.values() if isinstance(chosen, Chosen)]
    assert [chosen.blocks for chosen in held] == [blocks] * 3
    assert sum(chosen.bits.nbytes for chosen in held) == 3 * -(-(blocks.num_blocks**2) // 8)


def test_clusters_go_on_from_those_of_the_step_before(monkeypatch):
    started = []

    def watched(x, count, start=None):
        started.append(start)
        return clustered(x, count, start)

    monkeypatch.setattr(clusters, "clustered", watched)
    pattern = Pattern(Cluster(Share(0.3, 1), refresh=2))
    runtime = runtime_of(*[pattern] * 3)
    outs = [runtime(call_at(step)) for step in range(3)]
    assert len(started) == 12 and started[:6] == [None] * 6 and None not in started[6:]
    assert all(out.isfinite().all() for out in outs)
    want = dense(call_at(0).q, call_at(0).k, call_at(0).v)
    assert not torch.allclose(outs[0], want, atol=1e-3), "sparse"
    runtime(call_at(0, run=1))
    assert started[12:] == [None] * 6, "another generation starts anew"


def test_one_token_and_budgets_of_nothing_and_of_all():
    for shape in (Pooled(Budget(beta=0.0, least=1)), Pooled(Budget(beta=1.0))):
        runtime = runtime_of(*[Pattern(shape, tile=SMALL, far=True)] * 3)
        call = call_at(0)
        out = runtime(call)
        assert out.isfinite().all()
    torch.testing.assert_close(out, dense(call.q, call.k, call.v), rtol=1e-4, atol=1e-5)
    layout = TokenLayout.sequence(1)
    one = torch.ones(1, 1, 1, 8)
    found = blockwise_entries(one, one, {0: POOLED}, layout, 1.0)
    assert found[0].entry.num_queries == 1


def test_what_rules_refuse():
    pipe, _ = wan()
    wrong: tuple[Any, ...] = (0.0, 1.5, float("nan"), True, "0.3")
    for density in wrong:
        with pytest.raises(ValueError, match=r"density must be a number from 0.05 to 1, got"):
            patch(pipe, "online", density=density)
    with pytest.raises(ValueError, match="'sol' takes tau, not density"):
        patch(pipe, "sol", density=0.3)
    with words.command_line(), pytest.raises(ValueError, match="--threshold must be a number"):
        online_plan(pipe, "xattention", threshold=2)
    with pytest.raises(TypeError, match="density can be given with 'auto' and online, adaspa"):
        patch(pipe, "exact", density=0.3)
    with pytest.raises(ValueError, match=r"must be one of .*'online'.*, got 'onlin'"):
        online_plan(pipe, "onlin")
    with pytest.raises(NotImplementedError, match="'online' is for diffusion transformers"):
        patch(text("llama")[0], "online")
    with pytest.raises(ValueError, match="own_order needs a budget"):
        Pooled(keep=Above(0.5), own_order=True)
    with pytest.raises(PlanError, match="only heads of a diffusion_transformer find blocks"):
        replace(component(POOLED), kind="language_model")


def test_published_defaults():
    pipe, _ = wan()
    found = {name: online_plan(pipe, name).components["transformer"] for name in RULES}
    sol = found["sol"].layers
    first, *others = heads_of(pipe.transformer)
    assert sol[first][1][0].pattern == Pattern(Dense())
    assert sol[others[0]][1][0].pattern.tile == Curve("video", tokens=64)
    assert [len(part.stages) for part in found.values()] == [2] * len(RULES)
    assert found["svg2"].layers[others[0]][1][0].pattern == Pattern(Cluster())
    assert found["adaspa"].layers[first][0][0].pattern.shape.adaptive
    levels = [noise_level(pipe, share) for share in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert levels[0] == 1 and levels[-1] == 0 and levels == sorted(levels, reverse=True)
    assert found["xattention"].stages[0].progress_min == levels[1]
    assert noise_level(pipe.transformer, 0.2) == 0.8


@pytest.mark.fresh
@pytest.mark.parametrize("name", ["online", "adaspa"])
def test_compiled_blocks_find_what_eager_ones_find(name):
    pipe, call = wan()
    call = call | {"num_inference_steps": 4}
    with patch(pipe, name):
        eager = generate(pipe, call)
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    with patch(pipe, name):
        assert torch.equal(generate(pipe, call), eager)
    torch._dynamo.reset()


@pytest.mark.fresh
def test_pipelines_in_threads_find_their_own():
    calls = [(pipe, call | {"num_inference_steps": 4}) for pipe, call in (wan(seed=0), wan(seed=1))]
    want = []
    for pipe, call in calls:
        with patch(pipe, "online"):
            want.append(generate(pipe, call))
    with patch(calls[0][0], "online"), patch(calls[1][0], "online"), ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda each: generate(*each), calls))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
