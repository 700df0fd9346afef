"""A plain sequence, a grid of 1 x 1 x N: any pattern thins it out, in layers whose heads differ."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sparse_dit.attention import sparse_attention
from sparse_dit.call import AttentionCall, StepContext
from sparse_dit.index import build_index
from sparse_dit.layout import Segment, TokenLayout
from sparse_dit.patterns import Dense, Pattern, Stencil, Stripe, Vertical, Window
from sparse_dit.plan import ComponentPlan, HeadChoice, Plan, Stage
from sparse_dit.runtime import ALL_SEEN, Runtime

N, TILE = 300, 16
SEQUENCE = TokenLayout.sequence(N)
TILES = (1, 1, TILE)
SHAPES = {  # with what a query i sees of a key j
    "window": (Window(columns=20), None, lambda i, j: (i - j).abs() <= 20),
    "stripe": (
        Stripe(space_width=(0, 3), space_stride=(0, 40)),
        1,
        lambda i, j: (i - j).abs() % 40 <= 2,
    ),
    "stencil": (
        Stencil(((0, 0, -8, 1), (0, 0, -1, 3))),
        None,
        lambda i, j: torch.isin(j // TILE - i // TILE, torch.tensor([-8, -1, 0, 1])),
    ),
    "vertical": (
        Vertical((1, 1, 10), (0, 7)),
        1,
        lambda i, j: torch.isin(j * 10 // N, torch.tensor([0, 7])) | (i < 0),
    ),
}
PATTERNS = {name: Pattern(shape, TILES, cell) for name, (shape, cell, _) in SHAPES.items()}
DENSE = Pattern(Dense())
LAYERS = {"a": ((4, 8), list(PATTERNS.values())), "b": ((2, 24), [PATTERNS["vertical"], DENSE])}


def plan(far=False):
    layers = {
        layer: (tuple(HeadChoice(replace(p, far=far and not p.is_dense)) for p in patterns),)
        for layer, (_, patterns) in LAYERS.items()
    }
    heads = {layer: size for layer, (size, _) in LAYERS.items()}
    stages = (Stage(1.0, 0.0),)
    part = ComponentPlan("SomeModel", "0" * 64, heads, SEQUENCE, stages, layers)
    return Plan("", {"transformer": part}, 0.5)


def mask_of(name):
    """A pattern's mask, bool `[N, N]`: a tile of queries sees a cell if one of it sees one of it."""
    _, cell, sees = SHAPES[name]
    i, j = torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij")
    seen = sees(i, j)
    for axis, size in ((0, TILE), (1, cell or TILE)):
        parts = seen.split(size, axis)
        seen = torch.cat([x.any(axis, keepdim=True).expand_as(x) for x in parts], axis)
    return seen


def call_of(layer, layout=SEQUENCE):
    size, _ = LAYERS[layer]
    q, k, v = torch.randn(3, 1, N, *size, generator=torch.Generator().manual_seed(0))
    context = StepContext(layout, 0.5)
    return AttentionCall(layer, q, k, v, None, None, None, context, None, lambda: q)


def attend(runtime, call):
    out = runtime(call)
    (ran,) = (ran for ran in runtime.ran if ran.layer == call.layer)
    return out.transpose(1, 2), ran


@pytest.mark.parametrize("layer", LAYERS)
def test_a_saved_plan_thins_out_a_sequence_as_its_patterns_say(layer, tmp_path):
    plan().save(tmp_path / "plan.json")
    part = Plan.load(tmp_path).components["transformer"]
    call = call_of(layer)
    out, ran = attend(Runtime("transformer", part, "auto"), call)
    whole = torch.ones(N, N, dtype=torch.bool)
    names = {pattern: name for name, pattern in PATTERNS.items()}
    masks = [whole if p.is_dense else mask_of(names[p]) for p in LAYERS[layer][1]]
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    want = scaled_dot_product_attention(q, k, v, attn_mask=torch.stack(masks)[None])
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    assert ran.dense_because is None and ran.tokens == N
    assert ran.computed / ran.pairs == pytest.approx(torch.stack(masks).double().mean().item())
    assert all(mask.float().mean() < 0.6 for mask in masks if not mask.all())


def test_the_far_field_of_a_sequence_is_that_of_the_reference():
    part, call = plan(far=True).components["transformer"], call_of("a")
    out, ran = attend(Runtime("transformer", part, "auto"), call)
    index = build_index([head.pattern for head in part.layers["a"][0]], SEQUENCE)
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    want = sparse_attention(q, k, v, index, backend="reference")
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    assert ran.dense_because is None


@pytest.mark.parametrize("far", [False, True])
def test_a_sequence_of_global_tokens_is_dense_whatever_the_patterns(far):
    everywhere = TokenLayout((Segment.global_(N),))
    part, call = plan(far).components["transformer"], call_of("a", everywhere)
    out, ran = attend(Runtime("transformer", part, "auto"), call)
    assert ran.dense_because == ALL_SEEN and torch.equal(out, call.q.transpose(1, 2))
    for pattern in PATTERNS.values():
        assert build_index([replace(pattern, far=far)], everywhere).is_dense


def test_a_layer_with_other_heads_than_planned_runs_dense():
    part, call = plan().components["transformer"], call_of("a")
    call.layer = "b"
    _, ran = attend(Runtime("transformer", part, "auto"), call)
    assert ran.dense_because == "4 heads in this process, but the plan has 2"
