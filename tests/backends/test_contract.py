"""docs/contract.md: what every backend keeps, and that SparseIndex carries what kernels proper need, checked
with PyTorch's compiled FlexAttention.
"""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sparse_dit.attention import attend, sparse_attention
from sparse_dit.backends.cpu import library
from sparse_dit.index import build_index
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Stripe, Window
from sparse_dit.rounding import to_blocks
from tests.helpers.contract_cases import (
    check_autocast,
    check_empty,
    check_modes,
    check_nan,
    check_padding,
    check_strides,
    index_of,
    inputs,
)
from tests.helpers.inductor import needs_inductor
from tests.helpers.kernel_cases import qkv
from tests.helpers.settings_cases import threads

BLOCK = 32
NO_KERNEL = pytest.mark.skipif(library.LIBRARY is None, reason=str(library.PROBLEM))


def lists(blocks, rows, columns):
    """CSR lists as FlexAttention's counts and full-width index tables."""
    result = []
    for offsets, columns_of in (
        (blocks.partial_offsets, blocks.partial),
        (blocks.full_offsets, blocks.full),
    ):
        counts = offsets.diff()
        table = torch.zeros(rows, columns, dtype=torch.int32)
        for row in range(rows):
            table[row, : counts[row]] = columns_of[offsets[row] : offsets[row + 1]]
        result += [counts, table]
    return result


def bitmap(blocks, rows, columns):
    """Masks of all partial blocks by block, bool `[rows * columns, BLOCK, BLOCK]`."""
    table = torch.zeros(rows * columns, BLOCK, BLOCK, dtype=torch.bool)
    row = torch.repeat_interleave(torch.arange(rows), blocks.partial_offsets.diff().long())
    bits = blocks.bits[..., None] >> torch.arange(32) & 1
    table[row * columns + blocks.partial.long()] = bits.flatten(2).bool()
    return table


@needs_inductor
@pytest.mark.filterwarnings("ignore")  # inductor's own, on first compilation
def test_compiled_flex_attention_runs_the_rounded_lists():
    layout = TokenLayout.video(3, 8, 9, text_after=10)
    patterns = [
        Pattern(Window(0, 2, 2), (2, 4, 4)),
        Pattern(Stripe(space_width=(0, 2)), (None, 2, 4)),
    ]
    index = build_index(patterns, layout)
    n = layout.seq_len
    q, k, v = (
        torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    truth = attend(q, k, v, index, backend="reference").out
    rows = -(-n // BLOCK)
    parts, masks, sorted_inputs = [], [], []
    for head, entry in enumerate(index.entries):
        blocks = to_blocks(entry, BLOCK, BLOCK)
        assert len(blocks.full) and len(blocks.partial) and blocks.density < 1
        parts.append(lists(blocks, rows, rows))
        masks.append(bitmap(blocks, rows, rows))
        order = entry.k_order.long()
        sorted_inputs.append([x[:, head, order] for x in (q, k, v)])
    counts, table, full_counts, full_table = (
        torch.stack(part)[None].contiguous() for part in zip(*parts, strict=True)
    )
    mask = torch.stack(masks)  # [H, rows * rows, BLOCK, BLOCK]

    def mask_mod(b, h, i, j):
        return mask[h, i // BLOCK * rows + j // BLOCK, i % BLOCK, j % BLOCK]

    block_mask = BlockMask.from_kv_blocks(
        counts,
        table,
        full_counts,
        full_table,
        BLOCK_SIZE=BLOCK,
        seq_lengths=(n, n),
        compute_q_blocks=False,
        mask_mod=mask_mod,
    )
    sq, sk, sv = (torch.stack(x, 1) for x in zip(*sorted_inputs, strict=True))
    out = torch.compile(flex_attention, fullgraph=True)(sq, sk, sv, block_mask=block_mask)
    for head, entry in enumerate(index.entries):
        restored = torch.empty_like(out[:, head])
        restored[:, entry.q_order.long()] = out[:, head]
        torch.testing.assert_close(restored, truth[:, head], atol=2e-5, rtol=2e-5)


HERE = [
    pytest.param(name, marks=NO_KERNEL if name == "cpu" else ())
    for name in ("cpu", "gather", "reference")
]
CHECKS = [check_autocast, check_strides, check_modes, check_nan, check_padding, check_empty]


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_every_backend_keeps(check, backend):
    check(backend)


@pytest.mark.parametrize("backend", HERE)
def test_nan_in_causal_order(backend):
    """Rows of one group see other keys; those that don't see the bad one are as before."""
    check_nan(backend, causal=True)


@pytest.mark.parametrize("backend", HERE)
def test_half_precision_sums_do_not_overflow(backend):
    """Logits and sums beyond float16's 65,504; the specification computes them in float32."""
    index = build_index([Pattern(Dense())], TokenLayout.video(4, 16, 16))
    q, k, v = qkv(index, 64, dtype=torch.float16)
    q, v = q * 0 + 64, v * 0 + 300
    k = k * 0 + 32
    got = attend(q, k, v, index, backend=backend, scale=1.0, return_lse=True)
    assert torch.equal(got.out, v) and got.lse.isfinite().all()


def test_sizes_that_scaled_dot_product_attention_takes_and_this_does_not():
    """One message each: nothing is broadcast, and an index has heads and tokens."""
    index, (q, k, v) = index_of(), inputs(torch.float32)
    with pytest.raises(ValueError, match="agree in B and D"):
        attend(q, k[:1], v[:1], index)
    with pytest.raises(ValueError, match="must be a multiple of 0 key heads"):
        attend(q, k[:, :0], v[:, :0], index)
    with pytest.raises(ValueError, match="the index is for"):
        attend(q[:, :0], k, v, index)
    with pytest.raises(ValueError, match="the index is for"):
        attend(q[:, :, :0], k, v, index)


@pytest.mark.parametrize("mixed", [False, True])
def test_autocast_compiled(mixed):
    """Autocast around a compiled function, and inside of it."""
    index, (q, k, v) = index_of(), inputs(torch.float32)
    v = v.bfloat16() if mixed else v
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = sparse_attention(q, k, v, index)

    def inside(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sparse_attention(q, k, v, index)

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: sparse_attention(*x, index), fullgraph=True, backend="aot_eager"
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(q, k, v), want) and want.dtype == torch.bfloat16
    assert torch.equal(torch.compile(inside, fullgraph=True, backend="aot_eager")(q, k, v), want)
    if not mixed:
        assert compiled(q, k, v).dtype == torch.float32
    torch._dynamo.reset()


@NO_KERNEL
@pytest.mark.parametrize("count", [1, 2, 3])
def test_number_of_threads_changes_no_bit(count):
    index, (q, k, v) = index_of(), inputs(torch.float32)
    with threads(1):
        want = attend(q, k, v, index, backend="cpu", return_lse=True, mass_block=16)
    with threads(count):
        got = attend(q, k, v, index, backend="cpu", return_lse=True, mass_block=16)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
