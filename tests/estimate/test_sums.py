"""Sums over sampled rows: by the library and by torch, against a softmax of all rows in float64."""

import pytest
import torch

from sparse_dit.backends.cpu import estimates, library
from sparse_dit.estimate.rows import call_rows, sample_rows
from sparse_dit.estimate.sums import sampled_sums, sums_by_torch
from sparse_dit.intervals import RowIntervals
from tests.estimate.cases import probabilities, tensors

SCALE = 0.4
SIZES = [(200, 200), (64, 64), (65, 130), (1, 1), (1, 77), (33, 300), (190, 191)]
needs_library = pytest.mark.skipif(library.LIBRARY is None, reason=str(library.PROBLEM))


def padded(n, m):
    """Two items: one as it is, one behind 37 keys of padding; and the same packed, from token 50 on."""
    own = torch.arange(n) + m - n
    start = torch.stack([torch.zeros(n), torch.full((n,), min(37, m - 1))])
    return RowIntervals(start=start.maximum((own >= 50) * torch.tensor([[50], [0]])).int())


def expected(q, k, sample, heads, local):
    """Columns and diagonals of the sampled rows, by their definition."""
    full = [x.long().expand(len(q), -1) for x in (sample.rows, sample.start, sample.stop)]
    index = full[0][:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    p = probabilities(q.gather(2, index), k, SCALE, *full[1:])[:, heads]
    offset = full[0][..., None] + sample.offset - torch.arange(k.shape[2])
    bins = [
        torch.where((offset // 64 == b)[:, None], p, 0).sum((2, 3))
        for b in range(-(-k.shape[2] // 64))
    ]
    return torch.where((offset < local)[:, None], 0, p).sum(2), torch.stack(bins, -1)


@pytest.mark.parametrize("kind", ["last", "spread", "both"])
@pytest.mark.parametrize("n, m", SIZES)
def test_sums_are_those_of_a_plain_softmax(n, m, kind):
    for batch, rows in ((1, None), (2, None), (2, padded(n, m))):
        q, k = tensors(n, m, batch=batch)
        sample = sample_rows(call_rows(n, m, rows), kind, 24)
        for heads, local in ((range(4), 0), ([1, 2], 64), ([3], 30)):
            want = expected(q, k, sample, list(heads), local)
            sums = sampled_sums(q, k, sample, scale=SCALE, heads=heads, local=local)
            by_torch = sums_by_torch(q, k, sample, SCALE, list(heads), local)
            for found in ((sums.columns, sums.diagonals), by_torch):
                torch.testing.assert_close(found[0].double(), want[0], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(found[1].double(), want[1], rtol=1e-4, atol=1e-5)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_and_strides_and_variants(dtype, monkeypatch):
    q, k = (x.to(dtype) for x in tensors(150, 210, heads=6, kv_heads=2, dim=40))
    q, k = (
        q[..., ::2].contiguous()[..., :16],
        k.transpose(2, 3).contiguous().transpose(2, 3)[..., :16],
    )
    sample = sample_rows(call_rows(150, 210, None), "both", 40)
    want = sums_by_torch(q, k, sample, SCALE, range(6))
    for name in library.LIBRARY.runnable:
        kernel = library.Library(library.FILE, name)
        monkeypatch.setattr(library, "LIBRARY", kernel)
        found = sampled_sums(q, k, sample, scale=SCALE)
        torch.testing.assert_close(found.columns, want[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.diagonals, want[1], rtol=1e-4, atol=1e-5)


def test_means_are_per_row_that_sees_it():
    q, k = tensors(130, 130)
    call = call_rows(130, 130, None)
    columns, diagonals = sampled_sums(q, k, call, scale=SCALE).means()
    p = probabilities(q, k, SCALE, call.start, call.stop)[0]
    torch.testing.assert_close(
        columns[0, :, 7].double(), p[:, 7:, 7].mean(-1), rtol=1e-4, atol=1e-6
    )
    offset = torch.arange(130)[:, None] - torch.arange(130)
    second = (offset >= 64) & (offset < 128)
    want = (p * second).sum((1, 2)) / (second.sum() / 64)
    torch.testing.assert_close(diagonals[0, :, 1].double(), want, rtol=1e-4, atol=1e-6)


def test_two_equal_items_are_as_one():
    q, k = tensors(100, 100)
    sample = sample_rows(call_rows(100, 100, None), "both", 16)
    one = sampled_sums(q, k, sample, scale=SCALE).means_of_all()
    two = sampled_sums(q.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1), sample, scale=SCALE)
    for a, b in zip(one, two.means_of_all(), strict=True):
        torch.testing.assert_close(a, b)


def test_rows_of_padding_are_not_sampled():
    n = 120
    rows = RowIntervals(stop=torch.tensor([[120], [70]]).expand(2, n).int())  # padding at the end
    sample = sample_rows(call_rows(n, n, rows), "last", 20)
    assert sample.rows.tolist() == [list(range(100, 120)), list(range(50, 70))]
    few = RowIntervals(start=torch.tensor([[0], [115]]).expand(2, n).int())
    sample = sample_rows(call_rows(n, n, few), "spread", 20)
    assert sample.rows[1, :5].tolist() == [115, 116, 117, 118, 119]
    assert (sample.stop - sample.start)[1].tolist() == [1, 2, 3, 4, 5] + [0] * 15


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("by_torch", [True, False])
def test_a_row_that_is_not_finite_counts_for_nothing(value, by_torch):
    q, k = tensors(90, 90)
    q[:, 1, 80] = value
    sample = sample_rows(call_rows(90, 90, None), "last", 30)
    if by_torch:
        columns, _ = sums_by_torch(q, k, sample, SCALE, range(4))
    else:
        columns = sampled_sums(q, k, sample, scale=SCALE).columns
    torch.testing.assert_close(columns.sum(-1)[0], torch.tensor([30.0, 29.0, 30.0, 30.0]))


@needs_library
def test_the_library_refuses_rows_outside_of_the_call():
    q, k = tensors(20, 20)
    good = torch.arange(4).int()[None]
    for rows, start, stop in (
        (good + 17, good * 0, good),
        (good, good - 1, good),
        (good, good, good + 2),
    ):
        with pytest.raises(ValueError, match="outside of the call"):
            estimates.sums(q, k, rows, start, stop, heads=[0], scale=1.0)
    with pytest.raises(ValueError, match="outside of the call"):
        estimates.sums(q, k, good, good, good, heads=[2, 1], scale=1.0)


@needs_library
def test_threads_make_no_difference():
    q, k = tensors(500, 500, heads=8, kv_heads=2)
    sample = sample_rows(call_rows(500, 500, None), "both", 120)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(sampled_sums(q, k, sample, scale=SCALE))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0].columns, found[1].columns)
    assert torch.equal(found[0].diagonals, found[1].diagonals)
