"""The check of a backend before its first use: right ones pass, all kinds of wrong ones don't."""

import re
import types

import pytest
import torch
from torch.nn import functional as F

from sparse_dit import attention
from sparse_dit.backends import gather, selfcheck
from sparse_dit.index import SparseIndex
from sparse_dit.intervals import valid_rows

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def backend(forward, **more):
    module = types.ModuleType("made_up")
    module.forward, module.unsupported = forward, lambda q, index: None
    vars(module).update(more)
    return module


def right(q, k, v, index, rows, scale, return_lse, mass_block):
    return gather.forward(q, k, v, index, rows, scale, return_lse, mass_block)


def dense(q, k, v, index, rows, scale, return_lse, mass_block):
    out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    return selfcheck.Attended(out)


def one_list_for_all_heads(q, k, v, index, *rest):
    return right(q, k, v, SparseIndex(index.entries, (0,) * index.num_heads), *rest)


def wrong_key_heads(q, k, v, *rest):
    return right(q, k.flip(1), v.flip(1), *rest)


def no_padding(q, k, v, index, rows, *rest):
    return right(q, k, v, index, None, *rest)


def whole_tail(q, k, v, index, rows, *rest):
    """Drops the last, ragged keys."""
    short = valid_rows(torch.tensor([k.shape[2] // 64 * 64]), q.shape[2])
    return right(q, k, v, index, short, *rest)


def nan_where_nothing_is_seen(*arguments):
    got = right(*arguments)
    return got._replace(out=got.out.masked_fill(got.lse.isneginf()[..., None], torch.nan))


def base_two_lse(*arguments):
    got = right(*arguments)
    return got._replace(lse=got.lse / 0.6931)


def raises(*arguments):
    raise RuntimeError("no kernel image\nis available")


BROKEN = [
    (dense, "aren't 0"),
    (one_list_for_all_heads, "aren't 0|relative error"),
    (wrong_key_heads, "relative error"),
    (no_padding, "aren't 0"),
    (whole_tail, "relative error"),
    (nan_where_nothing_is_seen, "NaN or Inf"),
    (base_two_lse, "log-sum-exp is off"),
    (raises, "RuntimeError: no kernel image is available"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_right_backend_passes(dtype):
    found = selfcheck.examine(backend(right), "cpu", 64, dtype)
    assert found.problem is None and 0 <= found.error <= selfcheck.TOLERANCES[dtype] / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("forward", "words"), BROKEN, ids=[f.__name__ for f, _ in BROKEN])
def test_broken_backend_is_caught(forward, words, dtype):
    found = selfcheck.examine(backend(forward), "cpu", 64, dtype)
    assert found.problem is not None and re.search(words, found.problem)
    assert "\n" not in found.problem


def test_dense_is_caught_by_its_numbers_too():
    """Were it to leave empty rows at 0."""

    def sly(q, k, v, index, rows, scale, *rest):
        empty = right(q, k, v, index, rows, scale, True, None).lse.isneginf()
        out = dense(q, k, v, index, rows, scale, *rest).out
        return selfcheck.Attended(out.masked_fill(empty[..., None], 0.0))

    found = selfcheck.examine(backend(sly, TOLERANCE=0.2), "cpu", 64, torch.float16)
    assert "relative error" in found.problem and found.error > 0.3


def test_cases_are_sparse_ragged_and_differ_by_head():
    index = selfcheck.block_case()
    assert 0.2 < index.density < 0.7 and index.num_keys % 64
    masks = [selfcheck.reference.token_mask(entry)[0] for entry in index.entries]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    assert not masks[1][256:512].any()


def test_backend_that_runs_no_case_is_not_trusted():
    shy = backend(right)
    shy.unsupported = lambda q, index: "not today"
    assert "none of the cases" in selfcheck.examine(shy, "cpu", 64, torch.float32).problem


@pytest.fixture
def untested_cpu(monkeypatch):
    """As if the CPU were a GPU that no test has seen."""
    monkeypatch.setattr(attention, "TESTED_DEVICES", ())
    monkeypatch.setattr(attention, "AUTO", ("cpu", "gather"))
    monkeypatch.setattr(attention, "_said", set())
    monkeypatch.setattr(selfcheck, "_verdicts", {})


def call(name="auto"):
    index = selfcheck.block_case()
    q = torch.zeros(1, 4, index.num_queries, 64)
    return attention.backend_name(q, index, name)


def test_broken_backend_is_demoted_with_one_warning(untested_cpu, monkeypatch, caplog):
    calls = []

    def counted(*arguments):
        calls.append(1)
        return dense(*arguments)

    monkeypatch.setitem(attention.BACKENDS, "cpu", backend(counted))
    assert call() == call() == "gather"
    assert len(calls) == 1 and len(caplog.records) == 1
    assert "failed its check" in caplog.text
    with pytest.raises(NotImplementedError, match="failed its check on cpu"):
        call("cpu")


def test_right_backend_is_kept_and_checked_once(untested_cpu, monkeypatch, caplog):
    calls = []

    def counted(*arguments):
        calls.append(1)
        return right(*arguments)

    monkeypatch.setitem(attention.BACKENDS, "cpu", backend(counted))
    assert call() == call() == call("cpu") == "cpu"
    assert len(calls) == 3 and not caplog.records  # three cases


def test_nothing_is_checked_where_the_tests_run(monkeypatch):
    monkeypatch.setattr(attention, "verdict", lambda *_: pytest.fail("checked"))
    assert call("gather") == "gather"
