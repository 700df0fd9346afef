"""Whole indices, estimated from queries and keys."""

import dataclasses
import json

import pytest
import torch
from pydantic import TypeAdapter

from sparse_dit.attention import sparse_attention
from sparse_dit.backends.cpu import library
from sparse_dit.estimate import (
    Budget,
    Dense,
    PooledBlocks,
    Share,
    SinkWindow,
    VerticalSlash,
    estimated_index,
)
from sparse_dit.intervals import RowIntervals
from tests.estimate.cases import covers, tensors

SMALL = Budget(beta=0.1, least=1)
SHAPES = {
    "last": VerticalSlash("last", 16, SMALL, sinks=4),
    "spread": VerticalSlash("spread", 16, SMALL, sinks=4),
    "both": VerticalSlash("both", 16, SMALL, sinks=4, local=130),
    "share": VerticalSlash("both", 16, Share(0.5, least=1), sinks=0),
    "blocks": PooledBlocks(SMALL, sinks=4),
    "blocks by share": PooledBlocks(Share(0.5, least=1), sinks=0, local=1),
    "sink window": SinkWindow(4, SMALL),
    "no sink": SinkWindow(0, SMALL),
    "dense": Dense(),
}
SIZES = [(400, 400), (1, 1), (1, 200), (65, 65), (100, 333), (64, 192), (193, 194)]


@pytest.mark.parametrize("n, m", SIZES)
def test_every_row_sees_its_own_key_and_no_later_one(n, m, way):
    q, k = tensors(n, m, heads=18, kv_heads=6)
    index = estimated_index(q, k, [*SHAPES.values()] * 2)
    seen = covers(index)
    own = torch.arange(n) + m - n
    assert seen[:, torch.arange(n), own].all()
    assert torch.equal(seen.flatten(1).sum(1)[8::9], (own + 1).sum().expand(2)), "dense"
    assert index.rows.stop.tolist() == (own + 1).tolist()
    density = index.head_density
    assert ((density > 0) & (density <= 1)).all()
    if n == m == 400:
        assert (density[:8] < 0.85).all()


@pytest.mark.parametrize("name", SHAPES)
def test_padding_and_packed_sequences(name, way):
    n = 260
    q, k = tensors(n, n, batch=2)
    start = torch.zeros(2, n)
    start[1], start[0, 150:] = 90, 150
    rows = RowIntervals(start=start.int())
    seen = covers(estimated_index(q, k, [SHAPES[name]] * 4, rows=rows))
    assert seen[:, torch.arange(n), torch.arange(n)].all()
    if getattr(SHAPES[name], "sinks", 0):
        for first in (0, 90, 150):
            assert seen[:, 199, first : first + 4].all(), "sinks of each sequence"


def planted(n=700, column=77, offset=200):
    """Heads 0 and 1 look at one column; 2 and 3 at a diagonal; with some noise."""
    q, k = tensors(n, n, dim=64)
    q, k = q * 0.1, k * 0.1
    k[:, 0, column] = 3
    q[:, :2] += 0.5
    turn = torch.randn(n, 64, generator=torch.Generator().manual_seed(3))
    k[:, 1] = turn
    q[:, 2:, offset:] = turn[: n - offset] * 2
    return q, k


@pytest.mark.parametrize("rows", ["last", "spread", "both"])
@pytest.mark.parametrize("budget", [Budget(beta=0, least=160), Share(0.6, least=64)])
def test_a_needle_and_a_diagonal_are_found(rows, budget, way):
    q, k = planted()
    shape = VerticalSlash(rows, 16, budget, sinks=0)
    seen = covers(estimated_index(q, k, [shape] * 4))
    late = torch.arange(300, 700)
    assert seen[:2, late, 77].all()
    assert seen[2:, late, late - 200].all()
    assert seen.double().mean() < 0.9 * 0.5, "of all pairs, of which causal order has a half"


def test_blocks_find_a_needle(way):
    q, k = planted()
    seen = covers(estimated_index(q, k, [PooledBlocks(Budget(beta=0, least=192), sinks=0)] * 4))
    assert seen[:2, 300:, 77].all()
    assert seen.double().mean() < 0.4


def test_budgets_beyond_the_sequence_are_dense():
    q, k = tensors(90, 200, heads=4)
    large = Budget(least=200)
    shapes = [VerticalSlash(budget=large), PooledBlocks(large), SinkWindow(4, large), Dense()]
    index = estimated_index(q, k, shapes)
    assert index.is_dense and index.density == 1.0


def test_heads_of_one_shape_are_as_if_alone(way):
    q, k = tensors(300, 300)
    shapes = [SHAPES["last"], SHAPES["both"], SHAPES["last"], SHAPES["sink window"]]
    shapes[2] = dataclasses.replace(shapes[2], budget=Budget(beta=0.3, least=1))
    seen = covers(estimated_index(q, k, shapes))
    for head, shape in enumerate(shapes):
        alone = covers(estimated_index(q, k, [shape] * 4))
        assert torch.equal(seen[head], alone[head])


def test_the_library_and_torch_agree(monkeypatch):
    if library.LIBRARY is None:
        pytest.skip(str(library.PROBLEM))
    q, k = tensors(500, 600)
    shapes = [SHAPES[name] for name in ("last", "both", "blocks", "share")]
    one = covers(estimated_index(q, k, shapes))
    monkeypatch.setattr(library, "LIBRARY", None)
    differing = (one != covers(estimated_index(q, k, shapes))).double().mean()
    assert differing < 1e-3, "but for scores that are equal up to rounding"


def test_a_chunk_is_the_end_of_the_whole():
    q, k = tensors(512, 512)
    shape = VerticalSlash("last", 32, SMALL)
    whole = sparse_attention(q, k, k, estimated_index(q, k, [Dense()] * 4))
    chunk = sparse_attention(q[:, :, 300:], k, k, estimated_index(q[:, :, 300:], k, [Dense()] * 4))
    torch.testing.assert_close(chunk, whole[:, :, 300:])
    part = estimated_index(q[:, :, 300:], k, [shape] * 4)
    assert (part.num_queries, part.num_keys) == (212, 512) and part.density < 0.9
    assert sparse_attention(q[:, :, 300:], k, k, part).isfinite().all()


def test_a_window_that_needs_no_estimate_is_made_once():
    q, k = tensors(300, 300)
    shapes = [SHAPES["sink window"]] * 4
    one, two = estimated_index(q, k, shapes), estimated_index(q, k, shapes)
    assert one.entries[0] is two.entries[0] and one.head_to_pattern == (0, 0, 0, 0)


def test_it_is_made_on_the_cpu_whatever_the_default_device():
    q, k = tensors(210, 210, heads=8)
    shapes = [shape for name, shape in SHAPES.items() if name != "dense"]
    with torch.device("meta"):
        there = estimated_index(q, k, shapes)
    assert torch.equal(covers(there), covers(estimated_index(q, k, shapes)))


def test_nan_does_not_stop_an_estimate(way):
    q, k = tensors(300, 300)
    k[:, :, 10] = torch.nan
    q[:, :, 290, 0] = torch.inf
    seen = covers(estimated_index(q, k, [SHAPES["both"], SHAPES["blocks"]] * 2))
    assert seen[:, torch.arange(300), torch.arange(300)].all()


def test_shapes_are_plain_values():
    for shape in SHAPES.values():
        plain = json.loads(json.dumps(dataclasses.asdict(shape)))
        assert TypeAdapter(type(shape)).validate_python(plain) == shape
    assert hash(VerticalSlash()) == hash(VerticalSlash())
    with pytest.raises(ValueError, match="rows"):
        VerticalSlash(rows="first")


def test_what_does_not_fit_is_refused():
    q, k = tensors(40, 40)
    with pytest.raises(ValueError, match="one for each of 4 heads, got 1"):
        estimated_index(q, k, [Dense()])
    with pytest.raises(ValueError, match="no more rows than keys"):
        estimated_index(q, k[:, :, :9], [Dense()] * 4)
    with pytest.raises(ValueError, match="must be a multiple of 2 key heads"):
        estimated_index(q[:, :3], k, [Dense()] * 3)
    with pytest.raises(ValueError, match="share a dtype"):
        estimated_index(q, k.double(), [Dense()] * 4)
    with pytest.raises(ValueError, match=r"row_start must be int32 \[1, 40\]"):
        estimated_index(q, k, [Dense()] * 4, rows=RowIntervals(start=torch.zeros(40).int()))
