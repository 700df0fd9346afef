"""Lists of blocks with masks, as foreign code makes them, computed by every backend to the token."""

import dataclasses

import pytest
import torch

from sparse_dit.attention import BACKENDS, attend
from sparse_dit.index import SparseIndex, build_index
from sparse_dit.rounding import BlockIndex, from_blocks, to_blocks
from tests.helpers.cases import LAYOUTS, PATTERN_CASES


def pack(mask):
    """Bool `[n, block_q, block_k]` as words of 32 bits."""
    mask = torch.nn.functional.pad(mask, (0, -mask.shape[2] % 32)).unflatten(2, (-1, 32))
    return (mask.long() << torch.arange(32)).sum(-1).to(torch.int32)


def random_blocks(n, m, block_q, block_k, seed):
    """Lists of about a quarter full and a quarter partial blocks, and the token mask they stand for."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = -(-n // block_q), -(-m // block_k)
    lot = torch.rand(rows, columns, generator=generator)
    full, partial = lot < 0.25, (lot >= 0.25) & (lot < 0.5)
    masks = torch.rand(int(partial.sum()), block_q, block_k, generator=generator) < 0.3
    whole = full[:, :, None, None].expand(-1, -1, block_q, block_k).clone()
    whole[partial] = masks
    token_mask = whole.transpose(1, 2).reshape(rows * block_q, columns * block_k)[:n, :m]

    def lists(mask):
        offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        return offsets.int(), mask.nonzero()[:, 1].int()

    return BlockIndex(block_q, block_k, *lists(full), *lists(partial), pack(masks), 0.5), token_mask


@pytest.mark.parametrize("name", ["cpu", "triton", "gather"])
@pytest.mark.parametrize(
    ("n", "m", "block_q", "block_k"), [(130, 150, 32, 16), (96, 96, 48, 64), (70, 41, 128, 24)]
)
def test_partial_blocks_by_bitmap_are_computed_to_the_token(name, n, m, block_q, block_k):
    blocks, mask = random_blocks(n, m, block_q, block_k, seed=n)
    entry = from_blocks(blocks, n, m)
    assert entry.density == pytest.approx(mask.float().mean().item(), abs=1e-6)
    index = SparseIndex((entry,), (0, 0))
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 2, n, 16, generator=generator)
    k, v = (torch.randn(1, 2, m, 16, generator=generator) for _ in range(2))
    found = BACKENDS[name].unsupported(q, index)
    if found:
        pytest.skip(found)
    logits = (q.double() @ k.double().mT / 4).masked_fill(~mask, -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)  # rows that see nothing give 0
    out = attend(q, k, v, index, backend=name).out
    torch.testing.assert_close(out, (weights @ v.double()).float(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_from_blocks_is_the_inverse_of_to_blocks(layout):
    for pattern in PATTERN_CASES[::3]:
        (entry,) = build_index([pattern], layout).entries
        n = layout.seq_len
        blocks = to_blocks(entry, 32, 16)
        back = from_blocks(blocks, n, n, q_order=entry.q_order, k_order=entry.k_order)
        again = to_blocks(back, 32, 16)
        for field in dataclasses.fields(BlockIndex):
            one, other = getattr(blocks, field.name), getattr(again, field.name)
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), field.name


def test_lists_that_do_not_fit_are_named():
    blocks, _ = random_blocks(64, 64, 32, 32, seed=0)
    with pytest.raises(ValueError, match="full_offsets must rise"):
        from_blocks(blocks, 97, 64)
    with pytest.raises(ValueError, match="must hold blocks 0 to 1"):
        from_blocks(dataclasses.replace(blocks, full=blocks.full + 2), 64, 64)
    with pytest.raises(ValueError, match="bits must have shape"):
        from_blocks(dataclasses.replace(blocks, bits=blocks.bits[:, :8]), 64, 64)
