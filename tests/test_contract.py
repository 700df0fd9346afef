"""SparseIndex carries what kernels proper need: checked with PyTorch's compiled FlexAttention."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sparse_dit.attention import attend
from sparse_dit.index import build_index
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Pattern, Stripe, Window
from sparse_dit.rounding import to_blocks

BLOCK = 32


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
