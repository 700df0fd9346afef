import itertools
from dataclasses import replace

import pytest
import torch

from sparse_dit.attention import sparse_attention
from sparse_dit.backends.reference import token_mask
from sparse_dit.curve import Curve
from sparse_dit.entry import expand
from sparse_dit.index import (
    PatternIndex,
    SparseIndex,
    build_index,
    pattern_index,
    seen_cells,
)
from sparse_dit.layout import TokenLayout, tile_order
from sparse_dit.patterns import Dense, Pattern, Skip, Window
from sparse_dit.rounding import to_blocks
from tests.helpers.cases import LAYOUTS, PATTERN_CASES
from tests.helpers.kernel_cases import in_order


def expected_masks(pattern, layout):
    """The token masks that a pattern must give: cells seen by tiles, text by and of everyone."""
    n = layout.seq_len
    if pattern.is_dense or not layout.num_grid:
        return torch.ones(n, n, dtype=torch.bool), None
    order = tile_order(layout, pattern.tile)
    seen = seen_cells(pattern, order)
    cells = order.cell_offsets(pattern.cell)
    tile = torch.repeat_interleave(torch.arange(seen.shape[0]), order.tile_offsets.diff())
    cell = torch.repeat_interleave(torch.arange(seen.shape[1]), cells.diff())
    video = order.order[order.global_before : order.global_before + layout.num_grid]
    exact = torch.ones(n, n, dtype=torch.bool)
    exact[video[:, None], video] = seen[tile][:, cell]
    pooled = torch.zeros(n, seen.shape[1], dtype=torch.bool)
    pooled[video] = ~seen[tile]
    return exact, pooled if pattern.far else None


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("group", [16, 64])
def test_index_is_the_pattern(layout, group):
    for pattern in PATTERN_CASES:
        entry = pattern_index(pattern, layout, group)
        exact, pooled = token_mask(entry)
        want_exact, want_pooled = expected_masks(pattern, layout)
        assert torch.equal(exact, want_exact), pattern
        assert (pooled is None) == (want_pooled is None)
        assert pooled is None or torch.equal(pooled, want_pooled), pattern
        count = exact.sum() + (0 if pooled is None else pooled.sum())
        assert entry.density == pytest.approx(count.item() / layout.seq_len**2)
        check_form(entry, group)


def check_form(entry: PatternIndex, group: int) -> None:
    """What kernels rely on."""
    for tensor in (entry.q_offsets, entry.run_offsets, entry.runs):
        assert tensor.dtype == torch.int32
    assert entry.q_offsets[0] == 0 and entry.q_offsets[-1] == entry.num_queries
    sizes = entry.q_offsets.diff()
    assert sizes.min() >= 1
    assert entry.num_groups == 1 or sizes.max() <= group
    lists = [(entry.run_offsets, entry.runs, entry.num_keys)]
    if entry.far is not None:
        lists.append((entry.far.run_offsets, entry.far.runs, len(entry.far.cell_offsets) - 1))
    for offsets, runs, limit in lists:
        assert offsets[0] == 0 and offsets[-1] == len(runs) and len(offsets) == entry.num_groups + 1
        for g in range(entry.num_groups):
            part = runs[offsets[g] : offsets[g + 1]]
            ends = part.sum(1)
            assert (part[:, 1] >= 1).all() and (ends <= limit).all()
            assert (part[1:, 0] > ends[:-1]).all(), "runs must ascend and not touch"


def test_patterns_are_interned():
    layout = TokenLayout.video(3, 5, 7)
    local = Pattern(Window(0, 0, 0), (1, 2, 2))
    patterns = [local, Pattern(Dense()), local]
    index = build_index(patterns, layout)
    assert index.head_to_pattern == (0, 1, 0)
    assert build_index(patterns[::-1], layout).entries[0] is index.entries[0]
    assert index.heads_of == ((0, 2), (1,))
    assert index.density == pytest.approx(index.head_density.mean().item())
    assert not index.is_dense and build_index([Pattern(Dense())], layout).is_dense


def test_skip_is_empty_and_costs_nothing():
    entry = pattern_index(Pattern(Skip()), TokenLayout.video(3, 5, 7))
    assert entry.is_empty and entry.density == 0


@pytest.mark.parametrize(("block_q", "block_k"), [(16, 32), (64, 64), (128, 64), (7, 9)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rounding_covers_exactly_and_reports_what_it_computes(layout, block_q, block_k):
    for pattern in PATTERN_CASES:
        entry = pattern_index(pattern, layout, 32)
        blocks = to_blocks(entry, block_q, block_k)
        n = layout.seq_len
        rows, columns = -(-n // block_q), -(-n // block_k)
        table = torch.zeros(rows * block_q, columns * block_k, dtype=torch.bool)
        listed = torch.zeros_like(table)
        for row in range(rows):
            top = slice(row * block_q, (row + 1) * block_q)
            for column in blocks.full[
                blocks.full_offsets[row] : blocks.full_offsets[row + 1]
            ].tolist():
                table[top, column * block_k : (column + 1) * block_k] = True
                listed[top, column * block_k : (column + 1) * block_k] = True
            for place in range(blocks.partial_offsets[row], blocks.partial_offsets[row + 1]):
                bit = blocks.bits[place][..., None] >> torch.arange(32) & 1
                mask = bit.flatten(1)[:, :block_k].bool()
                column = blocks.partial[place].item()
                assert mask.any()
                table[top, column * block_k : (column + 1) * block_k] |= mask
                listed[top, column * block_k : (column + 1) * block_k] = True
        order = torch.arange(n) if entry.q_order is None else entry.q_order.long()
        exact = token_mask(entry)[0][order][:, order]
        assert torch.equal(table[:n, :n], exact), pattern
        assert blocks.density == pytest.approx(listed[:n, :n].float().mean().item())
        assert blocks.density >= exact.float().mean().item() - 1e-9


def test_causal_density_counts_the_causal_half():
    layout = TokenLayout.video(2, 4, 8, text_before=5)
    for pattern in (
        Pattern(Dense()),
        Pattern(Window(0, 1, 1), (1, 2, 2)),
        Pattern(Window(0, 0, 0), far=True),
    ):
        index = in_order(build_index([pattern], layout))
        exact, pooled = token_mask(index.entries[0])
        n = layout.seq_len
        causal = torch.ones(n, n).tril().bool()
        count = (exact & causal).sum()
        if pooled is not None:
            entry = index.entries[0]
            order = entry.k_order.long()
            bounds = entry.far.cell_offsets.tolist()
            last = torch.tensor([order[a:b].max() for a, b in itertools.pairwise(bounds)])
            count += (pooled & (last <= torch.arange(n)[:, None])).sum()
        assert index.density == pytest.approx(count.item() / causal.sum().item())


def test_bad_indices():
    layout = TokenLayout.video(2, 2, 2)
    with pytest.raises(ValueError, match="one pattern for each head"):
        build_index([], layout)
    with pytest.raises(ValueError, match="group must be 1 to 128"):
        build_index([Pattern(Dense())], layout, group=0)
    entry = pattern_index(Pattern(Dense()), layout)
    with pytest.raises(ValueError, match="head_to_pattern"):
        SparseIndex((entry,), (1,))
    other = pattern_index(Pattern(Dense()), TokenLayout.video(1, 1, 1))
    with pytest.raises(ValueError, match="same number of tokens"):
        SparseIndex((entry, other), (0, 1))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("cell", [None, 5])
def test_finer_pools_cut_the_far_field_alone(layout, cell):
    """A pool of single tokens is what its cell is without pooling: dense attention."""
    shape, size = Window(frames=0, rows=1), (2, 2, 3)
    whole = Pattern(shape, size, cell=cell, far=True)
    q, k, v = torch.randn(3, 1, 1, layout.seq_len, 8, generator=torch.Generator().manual_seed(0))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for pool in (1, 2, 4, 100):
        fine = replace(whole, pool=pool)
        index, other = build_index([fine], layout), build_index([whole], layout)
        one, two = index.entries[0], other.entries[0]
        assert torch.equal(one.runs, two.runs)
        if one.far is None:  # no video
            continue
        assert one.far.cell_offsets.diff().max() <= pool
        truth = sparse_attention(q, k, v, index, backend="reference")
        assert pool > 1 or torch.allclose(truth, dense, atol=2e-5)
        for backend in ("gather", "cpu"):
            out = sparse_attention(q, k, v, index, backend=backend)
            assert torch.allclose(out, truth, atol=2e-5), backend
        for group in range(one.num_groups):
            pooled = [
                expand(e.far.runs[e.far.run_offsets[group] : e.far.run_offsets[group + 1]])
                for e in (one, two)
            ]
            tokens = [
                [t for c in cells.tolist() for t in range(*e.far.cell_offsets[c : c + 2].tolist())]
                for cells, e in zip(pooled, (one, two), strict=True)
            ]
            assert tokens[0] == tokens[1]
        if pool == 100:
            assert torch.equal(one.far.runs, two.far.runs)


@pytest.mark.parametrize("text", [(0, 0), (5, 0), (0, 3), (2, 3)])
@pytest.mark.parametrize("other", [(1, 2, 4), (3, 5, 7), Curve("frame", tokens=8)])
def test_the_index_of_a_sequence_that_is_sorted_already(text, other):
    """It computes the same, and heads of the tile that it is sorted by have no order."""
    layout = TokenLayout.video(3, 5, 7, text_before=text[0], text_after=text[1])
    shared = (2, 3, 3)
    patterns = [
        Pattern(Window(frames=0, rows=1, columns=1), tile=shared, far=True),
        Pattern(Window(frames=1, rows=1, columns=1), tile=other),
        Pattern(Dense()),
    ]
    plain = build_index(patterns, layout)
    index = build_index(patterns, layout, sorted_by=shared)
    assert [entry.q_order is None for entry in index.entries] == [True, False, True]
    assert [entry.k_order is None for entry in index.entries] == [True, False, True]
    assert index.entries[1].q_order is index.entries[1].k_order
    assert build_index(patterns, layout, sorted_by=shared).entries[1] is index.entries[1]
    order = tile_order(layout, shared).order
    q, k, v = torch.randn(3, 1, 3, layout.seq_len, 16, generator=torch.Generator().manual_seed(0))
    want = sparse_attention(q, k, v, plain, backend="reference")[:, :, order]
    got = sparse_attention(*(x[:, :, order] for x in (q, k, v)), index, backend="reference")
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="queries and keys must have one order"):
        replace(plain.entries[0], k_order=None).placed(order)
