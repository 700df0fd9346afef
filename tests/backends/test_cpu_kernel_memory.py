"""Where the native CPU kernel reads and writes: strides, edges of memory, and every element once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_dit.attention import attend
from sparse_dit.backends.cpu import library
from sparse_dit.index import SparseIndex
from tests.helpers.kernel_cases import (
    DTYPES,
    assert_close,
    dense,
    entry,
    in_order,
    one_head,
    qkv,
    split,
    until,
)

pytestmark = pytest.mark.skipif(library.LIBRARY is None, reason=str(library.PROBLEM))
ROOT = Path(__file__).resolve().parents[2]
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")


def sparse(n=70, m=90):
    keys = [range(m), range(0, m, 3), [], range(m - 7, m), range(40)]
    cells = [40, 50, 77, m]
    pooled = [[], [], [0, 2], [0, 1], [1, 2]]
    e = entry(
        m, split(n, 16), keys, q_order=torch.arange(n).flip(0), k_order=None, cells=cells,
        pooled=pooled,
    )  # fmt: skip
    return SparseIndex((e, dense(n, m)), (0, 1, 0, 1))


def by_token(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def inside(x):
    """A slice of a larger tensor that is NaN all around."""
    b, h, n, d = x.shape
    whole = torch.full((b + 1, h + 2, n + 3, d + 24), torch.nan, dtype=x.dtype)
    view = whole[1:, 1:-1, 2:-1, 8:-16]
    view.copy_(x)
    return view


def odd(x):
    """Steps that are no multiple of anything."""
    b, h, n, d = x.shape
    whole = torch.full((b, h, n, d + 5), torch.nan, dtype=x.dtype)
    whole[..., :d] = x
    return whole[..., :d]


def spread_channels(x):
    whole = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
    whole[..., ::2] = x
    return whole[..., ::2]


def channels_first(x):
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def in_pages(x):
    """Rows exactly one page of 4096 bytes apart, or two."""
    b, h, n, d = x.shape
    step = (2 if h > 2 else 1) * 4096 // x.element_size()
    whole = torch.full((b, h, n, step), torch.nan, dtype=x.dtype)
    whole[..., :d] = x
    return whole[..., :d]


def heads_in_pages(x):
    """As a projection to 4096 bytes gives it: tokens a page apart, heads inside."""
    b, h, n, d = x.shape
    whole = torch.full((b, n, 4096 // x.element_size()), torch.nan, dtype=x.dtype)
    view = whole[..., : h * d].unflatten(-1, (h, d))
    view.copy_(x.transpose(1, 2))
    return view.transpose(1, 2)


def shifted(x):
    """Starts 1 element after an aligned address."""
    whole = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)
    whole[1:] = x.reshape(-1)
    return whole[1:].view(x.shape)


VIEWS = {
    f.__name__: f
    for f in (
        by_token, inside, odd, spread_channels, channels_first, in_pages, heads_in_pages, shifted
    )
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("which", ["q", "k", "v", "qkv"])
def test_strides(variant, dtype, view, which):
    index = sparse()
    inputs = qkv(index, 24, batch=2, kv_heads=2, dtype=dtype)
    views = [VIEWS[view](x) if name in which else x for name, x in zip("qkv", inputs, strict=True)]
    assert any(x.stride() != y.stride() for x, y in zip(inputs, views, strict=True)) or (
        view == "shifted"
    )
    ours = attend(*views, index, backend="cpu", return_lse=True, mass_block=20)
    rounds = "bf16" in variant and dtype == torch.bfloat16
    assert_close(ours, inputs, index, rounds_weights=rounds, mass_block=20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded_inputs(variant, dtype):
    """Steps of 0: one batch item, one key head, one key for all."""
    index = sparse()
    q, k, v = qkv(index, 24, batch=2, kv_heads=2, dtype=dtype)
    rounds = "bf16" in variant and dtype == torch.bfloat16
    for inputs in (
        [x[:1].expand(3, -1, -1, -1) for x in (q, k, v)],
        [q[:1].expand(2, -1, -1, -1), k[:, :1].expand(-1, 4, -1, -1), v[:, :1].expand(-1, 4, -1, -1)],
        [q[:, :, :1].expand(-1, -1, 70, -1), k[:, :, :1].expand(-1, -1, 90, -1), v],
        [q[..., :1].expand(-1, -1, -1, 24), k, v[..., :1].expand(-1, -1, -1, 24)],
    ):  # fmt: skip
        ours = attend(*inputs, index, backend="cpu", return_lse=True)
        assert_close(ours, inputs, index, rounds_weights=rounds)


def test_inputs_stay_as_they_are(variant):
    index = sparse()
    for dtype in DTYPES:
        inputs = qkv(index, 24, batch=2, dtype=dtype)
        copies = [x.clone() for x in inputs]
        attend(*inputs, index, backend="cpu", return_lse=True, mass_block=20)
        assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))


@pytest.fixture
def unfilled_is_nan():
    """Memory that torch hands out unfilled holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", [None, *VIEWS])
def test_every_element_is_written(variant, dtype, view, unfilled_is_nan):
    entries = (*sparse().entries, entry(90, [70], [[]]), dense(70, 90, 1))
    index = in_order(SparseIndex(entries, (0, 1, 2, 3)), -10)
    q, k, v = qkv(index, 40, batch=2, dtype=dtype)
    if view:
        q = VIEWS[view](q)
    stop = until(index, 0, 60)
    ours = attend(q, k, v, index, row_stop=stop, backend="cpu", return_lse=True, mass_block=7)
    assert not any(x.isnan().any() for x in ours)
    assert (ours.out[0] == 0).all() and (ours.mass[0] == 0).all()


@pytest.mark.parametrize("queries", [0, 1, 5])
@pytest.mark.parametrize("batch", [0, 1])
def test_nothing_to_do(queries, batch):
    index = one_head(entry(9, [queries] if queries else [], [range(9)] if queries else []), 2)
    q, k, v = qkv(index, 8, batch=batch)
    ours = attend(q, k, v, index, backend="cpu", return_lse=True)
    assert ours.out.shape == q.shape and ours.lse.shape == q.shape[:3]


def child(*words):
    """A module of `tests` in a process of its own: a step over an edge of memory ends it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@POSIX
def test_a_step_over_the_edge_would_be_noticed():
    assert child("tests.helpers.guard_pages", "overstep").returncode == -signal.SIGSEGV


@POSIX
def test_no_step_over_the_edge_of_memory(variant):
    done = child("tests.helpers.guard_pages", variant)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"ended with {done.returncode} in {lines[-1:]}: {done.stderr}"
    assert lines[-1] == "passed"


@POSIX
def test_broken_indices_are_refused(variant):
    """Random changes to a packed index: an error or a result of the right shape, never a crash."""
    done = child("tests.helpers.broken_indices", variant, "1500")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"ended with {done.returncode} in {lines[-1:]}: {done.stderr}"
    refused, taken = (int(word) for word in lines[-1].split()[1::2])
    assert refused > 700 and taken > 10
