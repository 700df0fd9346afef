"""The Triton kernels in Triton's interpreter, on the CPU, against the reference in float64.

`test_triton.py` runs this in a process of its own: the interpreter must be chosen before the kernels are
imported. Everything, in about 15 minutes:

    TRITON_INTERPRET=1 python -m pytest tests/gpu_without_gpu/triton_interpreted.py
"""

import itertools
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from sparse_dit.attention import attend, block_mass
from sparse_dit.backends.triton import interpreted, operator
from sparse_dit.index import SparseIndex, build_index
from sparse_dit.intervals import RowIntervals
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Skip, Stripe, Union, Vertical, Window
from tests.gpu_without_gpu import triton_bfloat16, triton_nested
from tests.helpers.cases import LAYOUTS, PATTERN_CASES
from tests.helpers.contract_cases import (
    check_autocast,
    check_empty,
    check_nan,
    check_padding,
    check_strides,
)
from tests.helpers.interval_cases import bounds, every_entry, masks
from tests.helpers.kernel_cases import (
    assert_close,
    assert_close_pooled,
    dense,
    entry,
    in_order,
    one_head,
    qkv,
    until,
)
from tests.helpers.settings_cases import deterministic

if not interpreted():
    pytest.skip("TRITON_INTERPRET=1 must be set", allow_module_level=True)
triton_bfloat16.install()
triton_nested.install()
torch.use_deterministic_algorithms(True, warn_only=True)  # fills what isn't written with NaN
LOCAL = Pattern(Window(0, 1, 1), (1, 2, 2), far=True)
SINKS = Pattern(Union((Window(0, 1, 1), Vertical((1, 3, 3), (4,)))), (2, 2, 2), sink_frames=1)
REQUEST = {"backend": "triton", "return_lse": True, "mass_block": 8}
SIX = 6  # patterns of a call


def sixes(patterns):
    """Six at a time, the last of them filled up."""
    return [(patterns[i : i + SIX] * SIX)[:SIX] for i in range(0, len(patterns), SIX)]


SOME = sixes(PATTERN_CASES[::4])  # every shape, in every order of tokens


def check(index, inputs, stop=None, mass_block=16, **keywords):
    ours = attend(
        *inputs, index, row_stop=stop, backend="triton", return_lse=True, mass_block=mass_block,
        **keywords,
    )  # fmt: skip
    assert_close(ours, inputs, index, row_stop=stop, mass_block=mass_block, **keywords)
    return ours


def run_patterns(patterns, layout, causal, padded, seed, mass_block=16):
    index = build_index(patterns, layout, group=32)
    index = in_order(index, 2) if causal else index
    lengths = [layout.seq_len, max(0, layout.seq_len - 5)][
        not causal :
    ]  # an item, or two in causal order
    stop = until(index, *lengths) if padded else None
    inputs = qkv(index, 16, batch=len(lengths) if padded else 1, kv_heads=3, seed=seed)
    check(index, inputs, stop, mass_block)


@pytest.mark.parametrize("turn", range(len(SOME)))
def test_every_shape(turn):
    """Layouts, causal order and padding in turn; that tables hold every pattern, `test_triton.py` says."""
    layout = LAYOUTS[turn * 3 % len(LAYOUTS)]
    mass_block = 16 if turn % 3 == 2 else None
    run_patterns(SOME[turn], layout, turn % 3 == 1, turn % 2 == 1, turn, mass_block)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("causal", "padded"), [*itertools.product((False, True), repeat=2)], ids=str
)
def test_every_pattern_everywhere(layout, causal, padded):
    for seed, patterns in enumerate(sixes(PATTERN_CASES)):
        run_patterns(patterns, layout, causal, padded, seed)


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        (64, torch.float16),
        (80, torch.bfloat16),
        (96, torch.float16),
        (128, torch.bfloat16),
        (40, torch.bfloat16),
    ],
    ids=str,
)
def test_low_precision(dim, dtype):
    """Sums are those of float32; weights are rounded once."""
    layout = TokenLayout.video(2, 7, 9, text_after=5)
    index = build_index([SINKS, Pattern(Stripe(space_width=(0, 2)), (None, 2, 4))], layout)
    inputs = qkv(index, dim, kv_heads=1, dtype=dtype)
    ours = attend(*inputs, index, backend="triton", return_lse=True)
    assert_close(ours, inputs, index, rounds_weights=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pooled_keys_in_low_precision(dtype):
    layout = TokenLayout.video(2, 6, 8)
    index = build_index([LOCAL, Pattern(Dense())], layout)
    inputs = qkv(index, 64, dtype=dtype, size=0.5)
    ours = attend(*inputs, index, backend="triton", return_lse=True)
    assert_close_pooled(ours, inputs, index)


def test_hand_made_lists():
    """More keys than queries, columns, ragged groups, groups and heads that see nothing, cells."""
    n, m = 150, 211
    order = torch.randperm(m, generator=torch.Generator().manual_seed(0))
    columns = entry(m, [128, 22], [range(3, m, 7), range(0, m, 2)], k_order=order)
    holes = entry(m, [10, 100, 40], [[], range(5, 170), [210]])
    cells = list(range(0, 208, 16))
    pooled = entry(
        m, [50, 50, 50], [[], range(16), []], k_order=order, cells=cells,
        pooled=[range(12), range(1, 12), []],
    )  # fmt: skip
    nothing = entry(m, [128, 22], [[], []])
    everything = (columns, holes, pooled, nothing, dense(n, m), dense(n, m, 30))
    index = SparseIndex(everything, (0, 1, 2, 3, 4, 5))
    ours = check(index, qkv(index, 32, batch=2, kv_heads=2))
    assert (ours.out[:, 3] == 0).all() and ours.lse[:, 1, :10].isneginf().all()
    late = in_order(index, m - n)
    check(late, qkv(late, 32, kv_heads=2), until(late, 170))
    early = in_order(SparseIndex(everything, (0, 2, 4)), -20)
    ours = check(early, qkv(early, 32))
    assert ours.lse[:, :, :20].isneginf().all()


HERE = ("left padding", "packed, both ways")  # the others on request


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.exhaustive] * (k not in HERE)) for k in masks()]
)
def test_row_intervals(kind):
    """Of a call; of an index, from which its tables are made; and of both."""
    index, rows = every_entry(group=32), bounds(masks()[kind])
    inputs = qkv(index, 16, batch=2, kv_heads=3)
    hidden = ~masks()[kind].any(1)[:, None, :, None]
    bad = [inputs[0], *(x.masked_fill(hidden, torch.nan) for x in inputs[1:])]
    ours = attend(*bad, index, **rows, **REQUEST)
    assert_close(ours, inputs, index, **rows, mass_block=8)
    own = replace(index, rows=RowIntervals(*(x[1] for x in rows.values())))
    inputs = [x[1:] for x in inputs]
    check(own, inputs)
    window = {name: x[1:] for name, x in bounds(masks()["window of both sides"]).items()}
    ours = attend(*inputs, own, **window, **REQUEST)
    assert_close(ours, inputs, own, **window, mass_block=8)


def test_nothing_outside_is_touched():
    """Inputs lie in tensors of NaN, and so do padding keys; rows of NaN would show."""
    layout = TokenLayout.video(1, 4, 6, text_after=3)
    index = build_index([LOCAL, Pattern(Dense()), SINKS, Pattern(Skip())], layout)
    n = layout.seq_len
    inputs = []
    for x in qkv(index, 40, batch=2, kv_heads=2):
        around = torch.full([s + 16 for s in x.shape], torch.nan)
        around[8:-8, 8:-8, 8:-8, 8:-8] = x
        inputs.append(around[8:-8, 8:-8, 8:-8, 8:-8])
    want = attend(*[x.contiguous() for x in inputs], index, backend="triton").out
    ours = check(index, inputs).out
    assert ours.isfinite().all() and torch.equal(ours, want)
    stop = until(index, n, n - 15)
    clean = attend(*inputs, index, row_stop=stop, backend="triton").out
    for x in inputs[1:]:
        x[1, :, n - 15 :] = torch.nan
    assert torch.equal(attend(*inputs, index, row_stop=stop, backend="triton").out, clean)
    assert clean.isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's
def test_nan_shows_where_it_is_seen():
    layout = TokenLayout.video(1, 8, 8)
    index = build_index([Pattern(Window(0, 0, 0), (1, 4, 4))], layout)
    q, k, v = qkv(index, 16)
    v[0, 0, 0] = torch.nan
    out = attend(q, k, v, index, backend="triton").out[0, 0].view(8, 8, -1)
    assert out[:4, :4].isnan().all() and not out[4:].isnan().any() and not out[:, 4:].isnan().any()
    q[0, 0, 63] = torch.inf
    assert attend(q, k, v, index, backend="triton").out[0, 0, 63].isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of rows whose query is NaN
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "check", [check_autocast, check_strides, check_nan, check_padding, check_empty]
)
def test_what_every_backend_keeps(check):
    check("triton")


def test_autocast_and_empty_batches():
    check_empty("triton")
    index = one_head(dense(8, 8))
    q, k, v = qkv(index, 16)
    want = attend(*(x.half() for x in (q, k, v)), index, backend="triton").out
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(attend(q, k, v.half(), index, backend="triton").out, want)


def test_mass_is_refused_where_it_must_be_deterministic():
    """Its sums have no fixed order."""
    index = one_head(dense(8, 8))
    inputs = qkv(index, 16)
    with deterministic():
        attend(*inputs, index, backend="triton", return_lse=True)
        with pytest.raises(NotImplementedError, match="no fixed order"):
            attend(*inputs, index, backend="triton", mass_block=8)


@pytest.mark.parametrize("scale", [0.5, -0.25, 0.0])
def test_any_scale(scale):
    index = build_index([LOCAL, SINKS], TokenLayout.video(2, 4, 6))
    check(index, qkv(index, 16), scale=scale)


def test_any_strides():
    """Tokens before heads, channels that aren't neighbours, and an address that isn't aligned."""
    index = build_index([LOCAL, SINKS], TokenLayout.video(2, 4, 6))
    inputs = qkv(index, 32)
    want = attend(*inputs, index, backend="triton").out
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert torch.equal(attend(*turned, index, backend="triton").out, want)
    spread = [x.repeat_interleave(2, 3)[..., ::2] for x in inputs]
    assert torch.equal(attend(*spread, index, backend="triton").out, want)
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in inputs]
    assert torch.equal(attend(*shifted, index, backend="triton").out, want)


def test_mass_from_a_cached_lse():
    index = build_index([LOCAL, SINKS], TokenLayout.video(2, 4, 6))
    q, k, v = qkv(index, 16)
    got = attend(q, k, v, index, backend="triton", return_lse=True, mass_block=8)
    assert torch.equal(block_mass(q, k, index, got.lse, mass_block=8, backend="triton"), got.mass)
    want = block_mass(q, k, index, got.lse - 1, mass_block=8, backend="reference")
    mine = block_mass(q, k, index, got.lse - 1, mass_block=8, backend="triton")
    torch.testing.assert_close(mine, want, atol=1e-5, rtol=1e-5)


def test_large_logits_stay_finite():
    index = one_head(dense(70, 200))
    inputs = [x * 30 for x in qkv(index, 16)]
    check(index, inputs)


def test_float64_is_declined():
    index = one_head(dense(8, 8))
    with pytest.raises(NotImplementedError, match="takes float16 and bfloat16, but q is"):
        attend(*(x.double() for x in qkv(index, 16)), index, backend="triton")


MIXED = [LOCAL, Pattern(Dense()), Pattern(Stripe(time_width=1), (2, 2, 2)), Pattern(Skip())]


@pytest.mark.parametrize(
    ("backend", "causal"),
    [
        ("graphs", False),
        ("aot_eager", True),
        pytest.param("graphs", True, marks=pytest.mark.exhaustive),
        pytest.param("aot_eager", False, marks=pytest.mark.exhaustive),
    ],
)
def test_compiled_in_one_graph_for_all_sizes(backend, causal):
    """One graph, and one more with sizes as variables; indices are made once, and found again."""
    torch._dynamo.reset()
    operator._INDICES.clear()
    graphs = CompileCounter()
    compiled = torch.compile(
        lambda q, k, v, i, n: attend(q * 2, k, v, i, row_stop=n, **REQUEST),
        fullgraph=True, backend=graphs if backend == "graphs" else backend,
    )  # fmt: skip
    wanted = {}
    for size in [(2, 2, 6), (3, 2, 6), (1, 4, 8), (2, 2, 6)]:
        layout = TokenLayout.video(*size, text_after=3)
        index = build_index(MIXED, layout)
        index = in_order(index) if causal else index
        inputs = qkv(index, 16, batch=2, kv_heads=2)
        stop = until(index, layout.seq_len, 20)
        if size not in wanted:
            wanted[size] = attend(inputs[0] * 2, *inputs[1:], index, row_stop=stop, **REQUEST)
        torch.testing.assert_close(compiled(*inputs, index, stop), wanted[size])
    assert graphs.frame_count == (2 if backend == "graphs" else 0)
    assert len(operator._INDICES) == len(wanted)
    torch._dynamo.reset()


def test_parts_make_the_same_index_again():
    for layout in LAYOUTS:
        for pattern in PATTERN_CASES:
            index = in_order(build_index([pattern, Pattern(Dense()), pattern], layout))
            again = operator.index_of(*operator.parts_of(index))
            assert again is operator.index_of(*operator.parts_of(index))
            assert operator.parts_of(again)[1] == operator.parts_of(index)[1]
            same = zip(operator.parts_of(again)[0], operator.parts_of(index)[0], strict=True)
            assert all(a is b for a, b in same)
    other = in_order(build_index([Pattern(Dense()), pattern, pattern], layout))
    assert operator.index_of(*operator.parts_of(other)) is not again


@pytest.mark.parametrize("lengths", [None, (27, 7)], ids=["full", "padded"])
def test_operators_are_what_torch_expects(lengths):
    index = build_index(MIXED, TokenLayout.video(2, 2, 6, text_after=3))
    rows = (None, None if lengths is None else until(index, *lengths))
    inputs = qkv(index, 16, batch=2, kv_heads=2)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)
    parts = operator.parts_of(index)
    torch.library.opcheck(torch.ops.sparse_dit.triton_attend, (q, k, v, *parts, *rows, 0.5))
    out, lse = torch.ops.sparse_dit.triton_attend(q, k, v, *parts, *rows, 0.5)
    assert out.stride() == q.stride()
    arguments = (q, k, *parts, lse, *rows, 0.5, 8, index.max_groups)
    torch.library.opcheck(torch.ops.sparse_dit.triton_mass, arguments)


def test_exported_without_a_trace_of_the_index():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v, index, backend="triton").out

    index = build_index(MIXED, TokenLayout.video(2, 2, 6))
    inputs = tuple(qkv(index, 16))
    program = torch.export.export(Layer(), inputs)
    torch.testing.assert_close(program.module()(*inputs), Layer()(*inputs))


def test_a_patched_transformer_compiles_to_the_graphs_of_stock():
    """Blocks are compiled whole, as one graph, with the Triton backend behind the seam."""
    from sparse_dit.patch import patch
    from tests.helpers.tiny_pipelines import generate, wan
    from tests.test_patch import FAR, NARROW, plan_for

    pipe, call = wan()
    short = {"num_frames": 5, "num_inference_steps": 1}
    with patch(pipe, plan_for(pipe, NARROW, FAR), backend="triton"):
        want = generate(pipe, call, **short)
    torch._dynamo.reset()
    graphs = CompileCounter()
    with patch(pipe, plan_for(pipe, NARROW, FAR), backend="triton") as handle:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=graphs)
        torch.testing.assert_close(generate(pipe, call, **short), want)
        ran = {entry.backend for entry in handle.ran["transformer"]}
        assert ran == {"triton"} and handle.summary().dense_calls == 0
    assert graphs.frame_count == 1
    torch._dynamo.reset()
