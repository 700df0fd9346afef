"""NaN in a sparse head: that head dense, the others untouched, said once."""

import pytest
import torch

from sparse_dit import attention, nan_guard
from sparse_dit.attention import sparse_attention
from sparse_dit.index import build_index
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Pattern, Window

LAYOUT = TokenLayout.video(2, 4, 6)


@pytest.fixture
def broken_heads(monkeypatch):
    """The gather backend with NaN in head 1 and Inf in head 2 of the second item."""

    def forward(*arguments):
        got = right(*arguments)
        got.out[0, 1, 3] = torch.nan
        got.out[1, 2, 0, 0] = torch.inf
        return got

    right = attention.BACKENDS["gather"].forward
    monkeypatch.setattr(attention.BACKENDS["gather"], "forward", forward)
    monkeypatch.setattr(nan_guard, "_told", set())


def call(causal=False, kv_len=None, guard=True):
    q = torch.randn(2, 4, 48, 8, generator=torch.Generator().manual_seed(0))
    k, v = q[:, :2] + 1, q[:, 2:] - 1
    index = build_index([Pattern(Window(0, 1, 1), (1, 2, 2))] * 4, LAYOUT, causal=causal)
    out = sparse_attention(
        q, k, v, index, kv_len=kv_len, scale=0.3, backend="gather", nan_guard=guard
    )
    return out, (q, *(x.repeat_interleave(2, 1) for x in (k, v)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_len", [None, torch.tensor([30, 0])])
def test_such_heads_are_dense(broken_heads, causal, kv_len):
    out, (q, k, v) = call(causal, kv_len)
    mask = torch.ones(2, 1, 48, 48, dtype=torch.bool)
    if causal:
        mask = mask.tril()
    if kv_len is not None:
        mask = mask & (torch.arange(48) < kv_len[:, None])[:, None, None]
    logits = (q @ k.mT * 0.3).masked_fill(~mask, -torch.inf)
    dense = logits.softmax(-1).nan_to_num(0.0) @ v
    torch.testing.assert_close(out[:, 1:3], dense[:, 1:3])
    sparse = call(causal, kv_len, guard=False)[0]
    assert torch.equal(out[:, [0, 3]], sparse[:, [0, 3]]) and not sparse.isfinite().all()


def test_it_is_said_once(broken_heads, caplog):
    call(), call()
    assert len(caplog.records) == 1 and "heads [1, 2]" in caplog.text


def test_nothing_happens_to_finite_heads(monkeypatch, caplog):
    monkeypatch.setattr(nan_guard, "scaled_dot_product_attention", lambda *_: pytest.fail("dense"))
    assert torch.equal(call()[0], call(guard=False)[0]) and not caplog.records
