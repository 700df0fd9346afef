"""Choosing within a budget, and laying runs: by the library and by torch, bit for bit."""

import pytest
import torch

from sparse_dit.backends.cpu import estimates, library
from sparse_dit.estimate.budget import choose, fewest, within, within_by_torch
from sparse_dit.estimate.rows import call_rows
from sparse_dit.estimate.runs import runs_by_torch, slash_entries
from sparse_dit.estimate.shapes import Budget, Share
from sparse_dit.index import SparseIndex
from sparse_dit.intervals import RowIntervals, causal_rows
from tests.estimate.cases import covers

needs_library = pytest.mark.skipif(library.LIBRARY is None, reason=str(library.PROBLEM))
SIZES = [(200, 200), (64, 64), (70, 200), (1, 1), (1, 130), (129, 130), (128, 200), (63, 64)]


def choices(n, m):
    """Columns and bins of several heads: few and many, alone and in runs, none and all."""
    generator = torch.Generator().manual_seed(n + m)
    bins = -(-m // 64)
    odds = torch.tensor([0, 0.02, 0.1, 0.5, 0.9, 1])
    columns = torch.rand(6, m, generator=generator) < odds[:, None]
    columns[2] = columns[2].roll(1) | columns[2] | columns[2].roll(2)
    slashes = (
        torch.rand(6, bins, generator=generator) < torch.tensor([0, 0.5, 0.2, 0.7, 0, 1])[:, None]
    )
    return torch.cat([columns, slashes], 1)


@pytest.mark.parametrize("n, m", SIZES)
def test_runs_are_columns_and_diagonals_up_to_the_last_row(n, m):
    chosen = choices(n, m)
    entries = slash_entries(chosen, n, m)
    seen = covers(SparseIndex(tuple(entries), tuple(range(6)), causal_rows(n, m, m - n)))
    own = torch.arange(n)[:, None] + m - n
    first = torch.arange(n)[:, None] // 64 * 64 + m - n  # of the group
    key = torch.arange(m)
    for head, (columns, slashes) in enumerate(zip(chosen[:, :m], chosen[:, m:], strict=True)):
        want = columns.expand(n, m).clone()
        for b in slashes.nonzero():
            want |= (key >= first - 64 * b - 64) & (key < first - 64 * b + 64)
            assert bool((want | (key > own) | ((own - key) // 64 != b))[:, :].all()), (
                "all of the bin"
            )
        assert torch.equal(seen[head], want & (key <= own))
        for start, stop in zip(
            entries[head].run_offsets, entries[head].run_offsets[1:], strict=False
        ):
            runs = entries[head].runs[start:stop]
            assert (runs[1:, 0] > runs[:-1].sum(1)).all(), "sorted, and not touching"
            assert (runs[:, 1] > 0).all()


@needs_library
@pytest.mark.parametrize("n, m", SIZES)
def test_the_library_lays_the_runs_that_torch_does(n, m):
    for a, b in zip(
        estimates.lay_runs(choices(n, m), n, m), runs_by_torch(choices(n, m), n, m), strict=True
    ):
        assert torch.equal(a, b)


@needs_library
@pytest.mark.parametrize("seed", range(6))
def test_the_library_chooses_what_torch_does(seed):
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 400, (), generator=generator))
    scores = torch.rand(5, size, generator=generator) ** 4
    scores[1] = (scores[1] * 5).round()  # equal ones
    scores[2] -= 0.3
    scores[3] = 0
    scores[4, ::3] = -0.0
    costs = torch.randint(0, 50, (size,), generator=generator)
    forced = torch.rand(size, generator=generator) < 0.05
    total = int(costs.sum())
    for budget in (-1, 0, 1, total // 9, total // 2, total - 1, total, 2 * total):
        found = within(scores, costs, forced, budget)
        assert torch.equal(found, within_by_torch(scores, costs, forced, budget)), budget


@needs_library
def test_the_library_refuses_what_has_no_order():
    costs, forced = torch.ones(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="no NaN"):
        estimates.choose(torch.tensor([[1.0, torch.nan, 0]]), costs, forced, 5)
    with pytest.raises(ValueError, match="costs must be 0 or more"):
        estimates.choose(torch.zeros(1, 3), costs - 2, forced, 5)
    with pytest.raises(ValueError, match="int64 and forced bool"):
        estimates.choose(torch.zeros(1, 4), costs, forced, 5)


def test_the_best_for_their_cost_within_a_budget():
    scores, costs = torch.tensor([[0.1, 0.9, 0.5, 0.4]]), torch.tensor([1, 5, 3, 1])
    forced = torch.tensor([True, False, False, False])
    assert within(scores, costs, forced, 9).tolist() == [[True, True, True, False]]
    assert within(scores, costs, forced, 8).tolist() == [[True, True, False, False]], "in order"
    assert within(scores, costs, forced, 0).tolist() == [[True, False, False, False]]


def test_the_fewest_with_a_share():
    scores = torch.tensor([[0.1, 0.6, 0.3], [0.0, 0.0, 1.0]])
    assert fewest(scores, scores, 0.85).tolist() == [[False, True, True], [False, False, True]]
    assert fewest(scores, scores, 0.5).tolist() == [[False, True, False], [False, False, True]]
    assert fewest(scores, scores, 1.0)[0].all()


def test_a_budget_is_about_so_many_keys_a_row():
    n = 1024
    call, keys = call_rows(n, n, None), 300
    generator = torch.Generator().manual_seed(0)
    columns, diagonals = (
        torch.rand(2, n, generator=generator),
        torch.rand(2, 16, generator=generator),
    )
    chosen = choose(columns, diagonals * 20, call, Budget(beta=0, alpha=keys), sinks=10, local=65)
    assert chosen[:, :10].all() and chosen[:, n : n + 2].all()
    index = SparseIndex(tuple(slash_entries(chosen, n, n)), (0, 1), causal_rows(n, n, 0))
    pairs = torch.arange(1, n + 1).clamp_max(keys).sum() / (n * (n + 1) / 2)
    assert index.head_density.tolist() == pytest.approx([pairs.item()] * 2, rel=0.25)


def test_a_share_takes_what_a_prompt_needs():
    n = 640
    call = call_rows(n, n, None)
    columns, diagonals = torch.full((2, n), 1e-5), torch.full((2, 10), 1e-3)
    columns[0, 100:103], diagonals[0, 3] = 0.3, 0.9
    columns[1, ::2] = 0.002
    few, many = choose(columns, diagonals, call, Share(0.9, least=1), sinks=0, local=1)
    assert few.nonzero()[:, 0].tolist() == [100, 101, 102, n, n + 3]
    assert many[:n:2].sum() > 150


def test_budgets_grow_with_the_length():
    assert [Budget(64, 0.1, 256, 1000).keys(n) for n in (100, 4000, 20000)] == [256, 464, 1000]
    assert Budget(beta=0.5).keys(4096) == 2048
    with pytest.raises(ValueError, match="most must be at least least, got 3 and 9"):
        Budget(least=9, most=3)


def test_sinks_are_where_sequences_begin():
    n = 300
    start = torch.zeros(2, n)
    start[0, 130:] = 130  # packed
    start[1] = (torch.arange(n) - 99).clamp_min(0)  # a sliding window
    found = call_rows(n, n, RowIntervals(start=start.int())).sinks(4)
    assert found.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 130, 131, 132, 133]
    assert call_rows(1, 1, None).sinks(8).tolist() == [True]
