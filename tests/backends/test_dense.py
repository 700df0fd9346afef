"""Which dense kernel is taken: the fastest that computes the right thing."""

import time

import pytest
import torch
from torch.nn import functional as F

from benchmarks import dense

Q = torch.randn(1, 4, 40, 16, generator=torch.Generator().manual_seed(0))
K = Q[:, :2] + 0.5


def slow(q, k, v, scale):
    time.sleep(0.01)
    return dense.sdpa(q, k, v, scale)


def quick_and_wrong(q, k, v, scale):
    return q


def absent(q, k, v, scale):
    raise ImportError("no such kernel")


@pytest.fixture
def choice(monkeypatch):
    monkeypatch.setattr(dense, "_fastest", {})

    def offer(**runs):
        monkeypatch.setattr(dense, "candidates", lambda q: runs)

    return offer


def test_on_a_cpu_it_is_pytorchs_own(choice):
    assert list(dense.candidates(Q)) == ["sdpa"] and dense.fastest(Q, K, K, 0.25) == "sdpa"
    out = dense.dense_attention(Q, K, K)
    assert torch.equal(out, F.scaled_dot_product_attention(Q, K, K, enable_gqa=True))


def test_the_fastest_right_one_is_taken(choice):
    calls = []

    def quick(q, k, v, scale):
        calls.append(1)
        return wanted

    wanted = dense.sdpa(Q, K, K, 0.25)
    choice(wrong=quick_and_wrong, absent=absent, sdpa=slow, quick=quick)
    assert dense.fastest(Q, K, K, 0.25) == "quick"
    timed = len(calls)
    assert dense.fastest(Q, K, K, 0.25) == "quick" and len(calls) == timed
    assert dense.dense_attention(Q, K, K, 0.25) is wanted


def test_wrong_ones_leave_pytorchs_own(choice):
    choice(wrong=quick_and_wrong, absent=absent, sdpa=slow)
    assert list(dense.measured(Q, K, K, 0.25)) == ["sdpa"]
    assert dense.fastest(Q, K, K, 0.25) == "sdpa"
