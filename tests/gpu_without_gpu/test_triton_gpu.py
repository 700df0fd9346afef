"""The Triton kernels on a GPU, against the reference in float64. Without one, this is skipped whole.

The cases are those of the emulator, every pattern on top, and what only a device can show: that calls wait
for nothing, that they can be captured in a CUDA graph, and that large sequences are right.
"""

from __future__ import annotations

import functools

import pytest
import torch

from sparse_dit.attention import BACKENDS, attend, sparse_attention
from sparse_dit.backends import selfcheck, triton
from sparse_dit.backends.triton.check import is_right
from sparse_dit.backends.triton.chosen import ChosenIndex
from sparse_dit.bench.lists import build, layout_of
from sparse_dit.bench.truth import check, check_mass
from sparse_dit.estimate.blockwise import blockwise_entries
from sparse_dit.estimate.on_device import blocks_on_device
from sparse_dit.index import build_index
from sparse_dit.index import index_of as lists_of
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Budget, Dense, Pattern, Pooled, Window
from tests.gpu_without_gpu.triton_emulated import (
    FAR,
    INDICES,
    MIXED,
    POOLED,
    assert_pooled,
    every,
    made,
)
from tests.helpers.cases import LAYOUTS, PATTERN_CASES
from tests.helpers.kernel_cases import (
    assert_close,
    assert_close_pooled,
    in_order,
    one_head,
    qkv,
    truth_of,
    until,
)

if not torch.cuda.is_available() or triton._absent() or triton.interpreted():
    pytest.skip("this needs a GPU that torch sees, and triton", allow_module_level=True)
DEVICE = torch.device("cuda", 0)
CALL = {"backend": "triton", "return_lse": True}
LONG = ("blocks", "far", "columns", "diagonals", "tiles")


def on_gpu(inputs, index, **keywords):
    """The call on the GPU; what it made, on the CPU."""
    there = [x.to(DEVICE) for x in inputs]
    moved = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in keywords.items()
    }
    with torch.no_grad():
        got = attend(*there, index.to(DEVICE), **CALL, **moved)
    return got._replace(**{k: v.cpu() for k, v in got._asdict().items() if v is not None})


def within_nan(x):
    """A slice of a larger tensor, on the GPU, with all that lies around it."""
    assert x._base is not None
    return x._base.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.parametrize("case", every(INDICES), ids=str)
def test_the_cases_of_the_emulator(case):
    index, inputs, given, keywords, truth = made(case)
    there = [within_nan(x) for x in given]
    ours = on_gpu(there, index, **keywords)
    if case.kind in POOLED:
        assert_pooled(case, DEVICE)
        assert_close_pooled(ours, inputs, index, **keywords)
    else:
        assert_close(ours, inputs, index, truth=truth, rounds_weights=True, **keywords)


@functools.cache
def index_of(layout, first, causal):
    patterns = (PATTERN_CASES[first : first + 6] * 6)[:6]
    index = build_index(patterns, layout, group=32)
    return in_order(index, 2) if causal else index


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_pattern_everywhere(layout, causal):
    for first in range(0, len(PATTERN_CASES), 6):
        index = index_of(layout, first, causal)
        dtype = (torch.bfloat16, torch.float16)[first // 6 % 2]
        inputs = qkv(index, 64, batch=2, kv_heads=3, dtype=dtype, seed=first, size=0.5)
        n = layout.seq_len
        keywords = {"row_stop": until(index, n, max(0, n - 5))} if first % 4 == 0 else {}
        ours = on_gpu(inputs, index, **keywords)
        if any(e.far is not None for e in index.entries):
            assert_close_pooled(ours, inputs, index, **keywords)
        else:
            truth = truth_of(*inputs, index, **keywords)
            assert_close(ours, inputs, index, truth=truth, rounds_weights=True, **keywords)


@pytest.mark.parametrize("tokens", ["4099", "21x30x52"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("pattern", LONG)
def test_long_sequences(pattern, head_dim, tokens):
    """Sampled rows of thousands of tokens."""
    index = build(pattern, layout_of(tokens), 2, 0.1, 0)
    inputs = qkv(index, head_dim, dtype=torch.bfloat16, size=1.0)
    ours = on_gpu(inputs, index, mass_block=64)
    check("triton", ours.out, *inputs, index)
    if pattern != "far":
        check_mass("triton", ours.mass, *inputs, index, 64)


@pytest.mark.parametrize("dtype", triton.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_check_before_first_use(head_dim, dtype):
    assert selfcheck.examine(BACKENDS["triton"], DEVICE, head_dim, dtype).problem is None


@pytest.mark.parametrize("patterns", [MIXED, FAR], ids=["exact", "far"])
def test_a_call_waits_for_nothing_and_fits_a_graph(patterns):
    """With a cached index; a replay computes from what the inputs hold then."""
    index = build_index(patterns, TokenLayout.video(4, 16, 16)).to(DEVICE)
    q, k, v = (x.to(DEVICE) for x in qkv(index, 64, dtype=torch.bfloat16))
    with torch.no_grad():
        want = sparse_attention(q, k, v, index, backend="triton")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = sparse_attention(q, k, v, index, backend="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(again, want)
        graph = torch.cuda.CUDAGraph()
        fresh = q.clone()
        with torch.cuda.graph(graph):
            out = sparse_attention(fresh, k, v, index, backend="triton")
        other = torch.randn_like(q)
        fresh.copy_(other)
        graph.replay()
        assert torch.equal(out, sparse_attention(other, k, v, index, backend="triton"))


@pytest.mark.parametrize("dtype", triton.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_blocks_are_laid_out_on_the_device_as_on_the_host(head_dim, dtype):
    assert is_right(DEVICE, head_dim, dtype)


def test_finding_blocks_waits_for_nothing():
    """Once tables of the layout are there; the output is that of the blocks that the host would choose."""
    layout, pattern = TokenLayout.video(5, 18, 20), Pattern(Pooled(Budget(beta=0.3)), far=True)
    q, k, v = (torch.randn(1, 4, layout.seq_len, 64, device=DEVICE).bfloat16() for _ in range(3))
    patterns = dict.fromkeys(range(4), pattern)

    def found():
        seen = blocks_on_device(q, k, patterns, layout, 0.125).seen
        return triton.forward(
            q, k, v, ChosenIndex((*seen.values(),), DEVICE), None, 0.125, False, None
        ).out

    with torch.no_grad():
        found()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours = found()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        entries = blockwise_entries(q.cpu(), k.cpu(), patterns, layout, 0.125)
        index = lists_of({head: of.entry for head, of in entries.items()}).to(DEVICE)
        want = sparse_attention(q, k, v, index, scale=0.125, backend="triton")
    assert (ours - want).norm() / want.norm() < 3e-2


def test_compiled_code_calls_it():
    """One graph, and the numbers of eager calls."""
    index = build_index(FAR, TokenLayout.video(2, 16, 16)).to(DEVICE)
    inputs = [x.to(DEVICE) for x in qkv(index, 64, dtype=torch.bfloat16)]

    def layer(q, k, v):
        return sparse_attention(q * 2, k, v, index, backend="triton") + 1

    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True)(*inputs)
        torch.testing.assert_close(compiled, layer(*inputs))


def test_the_other_device_s_stream_is_used():
    """Launches go to the current stream: work queued there before is seen."""
    index = one_head(build_index([Pattern(Dense())], TokenLayout.video(4, 32, 32)).entries[0], 4)
    index = index.to(DEVICE)
    q, k, v = (x.to(DEVICE) for x in qkv(index, 64, dtype=torch.bfloat16))
    with torch.no_grad():
        want = sparse_attention(q, k, v, index, backend="triton")
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late = torch.empty_like(v).copy_(v)
            out = sparse_attention(q, k, late, index, backend="triton")
        stream.synchronize()
    assert torch.equal(out, want)


def test_near_heads_agree_with_dense_attention():
    """A window over everything is dense attention."""
    index = build_index([Pattern(Window(), (2, 4, 4))], TokenLayout.video(4, 12, 20)).to(DEVICE)
    q, k, v = (x.to(DEVICE) for x in qkv(index, 128, dtype=torch.bfloat16))
    with torch.no_grad():
        ours = sparse_attention(q, k, v, index, backend="triton").float()
        stock = torch.nn.functional.scaled_dot_product_attention(q, k, v).float()
    assert (ours - stock).norm() / stock.norm() < 1e-2
