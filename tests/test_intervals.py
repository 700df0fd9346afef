"""Row intervals: every mask that hosts make, on every backend that runs here, against the reference."""

import pytest
import torch

from sparse_dit.attention import attend, sparse_attention
from sparse_dit.backends.cpu import library
from sparse_dit.backends.reference import token_mask
from sparse_dit.cells import valid_cells
from sparse_dit.cut import slice_queries
from sparse_dit.index import SparseIndex
from sparse_dit.intervals import RowIntervals, causal_rows, valid_rows
from tests.helpers.interval_cases import KEYS, QUERIES, bounds, every_entry, masks
from tests.helpers.kernel_cases import assert_close, dense, in_order, one_head, qkv, truth_of

NO_KERNEL = pytest.mark.skipif(library.LIBRARY is None, reason=str(library.PROBLEM))
FAST = [pytest.param("cpu", marks=NO_KERNEL), "gather"]
ALL = [*FAST, "reference"]
KINDS = masks()


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_attention_under_the_mask(kind):
    index = one_head(dense(QUERIES, KEYS), 2)
    q, k, v = (x.double() for x in qkv(index, 16, batch=2))
    got = attend(q, k, v, index, **bounds(KINDS[kind]), backend="reference", return_lse=True)
    logits = (q @ k.mT / 4).masked_fill(~KINDS[kind][:, None], -torch.inf)
    torch.testing.assert_close(got.out, logits.softmax(-1).nan_to_num(0.0) @ v)
    torch.testing.assert_close(got.lse, logits.logsumexp(-1).float())


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", KINDS)
def test_backends_agree_with_the_reference(backend, kind):
    """All kinds of entries, shared key heads, block mass; and v of another width than k."""
    index, rows = every_entry(), bounds(KINDS[kind])
    q, k, v = qkv(index, 24, batch=2, kv_heads=3)
    for values in (v, torch.cat([v, v.flip(-1)], -1), v[..., :16]):
        request = {**rows, "mass_block": 16}
        ours = attend(q, k, values, index, backend=backend, return_lse=True, **request)
        assert_close(ours, (q, k, values), index, truth=truth_of(q, k, values, index, **request))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("kind", ["left padding", "right padding", "packed", "window"])
def test_keys_outside_of_a_rows_interval_never_show(backend, kind):
    """Keys in no row's interval change no bit, and others leave the rows finite that don't see them."""
    index, mask = every_entry(), KINDS[kind]
    inputs = qkv(index, 16, batch=2, kv_heads=3)
    request = {**bounds(mask), "backend": backend, "return_lse": True}
    clean = attend(*inputs, index, **request)
    q, k, v = (x.clone() for x in inputs)
    hidden = ~mask.any(1)[:, None, :, None]
    k, v = k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan)
    for ours, same in zip(attend(q, k, v, index, **request)[:2], clean[:2], strict=True):
        assert torch.equal(ours, same)
    token = int(mask[1].any(0).nonzero()[50])
    k[1, :, token], v[1, :, token] = torch.nan, torch.nan
    ours, blind = attend(q, k, v, index, **request), ~mask[1, :, token]
    assert ours.out[1, :, blind].isfinite().all() and blind.any()
    torch.testing.assert_close(ours.out[1, :, blind], clean.out[1, :, blind])
    assert ours.out[1, 0, ~blind].isnan().all()


@pytest.mark.parametrize("backend", ALL)
def test_what_an_index_and_a_call_say_meets(backend):
    index = every_entry()
    inputs = qkv(index, 16, batch=2, kv_heads=2)
    fixed = in_order(index, KEYS - QUERIES)
    window = bounds(KINDS["window of both sides"])
    want = attend(*inputs, index, **bounds(KINDS["window of both sides"] & KINDS["causal"]))
    got = attend(*inputs, fixed, **window, backend=backend)
    torch.testing.assert_close(got.out, want.out, rtol=1e-5, atol=1e-5)
    alone = attend(*inputs, fixed, backend=backend).out
    same = attend(*inputs, index, **bounds(KINDS["causal"]), backend=backend).out
    torch.testing.assert_close(alone, same, rtol=1e-5, atol=1e-5)


def test_constructors():
    assert causal_rows(5, 8, 3) is causal_rows(5, 8, 3)
    assert causal_rows(5, 8, 3).stop.tolist() == [4, 5, 6, 7, 8]
    assert causal_rows(4, 2, -1).stop.tolist() == [0, 1, 2, 2]
    rows = valid_rows(torch.tensor([3, 0]), 4)
    assert rows.uniform and rows.stop.tolist() == [[3] * 4, [0] * 4]
    assert rows.valid(5, 4).tolist() == [[0, 3], [0, 0]]
    odd = RowIntervals(torch.tensor([[-3, 9, 4]]).int(), torch.tensor([[2, 4, 99]]).int())
    assert [x.tolist() for x in odd.bounds(7, 3)] == [[[0, 7, 4]], [[2, 7, 7]]]
    assert odd.valid(7, 3).tolist() == [[0, 7]]


def test_intervals_of_an_index_fit_it():
    with pytest.raises(ValueError, match=r"row_stop must be int32 \[90\], got torch.int32 \[80\]"):
        SparseIndex((dense(90, 110),), (0,), causal_rows(80, 110))
    q, k, v = qkv(one_head(dense(4, 4)), 8)
    with pytest.raises(ValueError, match=r"row_start must be int32 \[1, 4\]"):
        sparse_attention(q, k, v, one_head(dense(4, 4)), row_start=torch.zeros(4).int())


@pytest.mark.parametrize("kind", KINDS)
def test_density_counts_the_pairs_in_the_intervals(kind):
    """Against the reference's masks, entry by entry."""
    mask, index = KINDS[kind][1], every_entry()
    rows = RowIntervals(*(x[1] for x in bounds(KINDS[kind]).values()))
    start, stop = (x[0, :, None] for x in rows.bounds(KEYS, QUERIES))
    for e in index.entries:
        exact, pooled = token_mask(e)
        count = (exact & mask).sum()
        if pooled is not None:
            cells = valid_cells(e, rows.valid(KEYS, QUERIES)[0])
            inside = (cells.size > 0) & (start <= cells.first) & (cells.last < stop)
            count += (pooled & inside).sum()
        want = count.item() / max(1, mask.sum().item())
        assert SparseIndex((e,), (0,), rows).density == pytest.approx(want)


@pytest.mark.parametrize(("start", "stop"), [(0, 16), (16, 48), (5, 6), (40, 90), (0, 90)])
def test_chunks_of_a_prefill_are_slices_of_its_index(start, stop):
    """A run of queries, with their intervals, gets the rows that the whole index gives it."""
    index = every_entry()
    still = SparseIndex(tuple(e for e in index.entries if e.q_order is None), (0, 1, 2, 0))
    part = slice_queries(still, start, stop)
    for whole, piece in zip(still.entries, part.entries, strict=True):
        pairs = zip(token_mask(whole), token_mask(piece), strict=True)
        assert all(a is b is None or torch.equal(a[start:stop], b) for a, b in pairs)
        assert piece.num_groups <= -(-(stop - start) // 16) + 1
    exact = in_order(SparseIndex(still.entries[:2], (0, 1, 0, 1)), KEYS - QUERIES)
    q, k, v = (x.double() for x in qkv(exact, 16, kv_heads=2))
    want = attend(q, k, v, exact, backend="reference").out[:, :, start:stop]
    chunk = slice_queries(exact, start, stop)
    got = attend(q[:, :, start:stop], k, v, chunk, backend="reference").out
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="queries must stay in place"):
        slice_queries(index, start, stop)
