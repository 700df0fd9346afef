"""NaN in a sparse head: that head dense, the others untouched, said once; by hand and in a patch."""

import copy
import pickle

import pytest
import torch

from sparse_dit import attention, nan_guard
from sparse_dit.attention import sparse_attention
from sparse_dit.index import build_index
from sparse_dit.integrations.parallel import Split, _Chunks
from sparse_dit.layout import TokenLayout
from sparse_dit.patch import patch
from sparse_dit.patterns import Pattern, Window
from tests.helpers.kernel_cases import in_order, until
from tests.helpers.tiny_pipelines import generate, wan
from tests.test_patch import DENSE, NARROW, plan_for

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


def call(causal=False, lengths=None, guard=True):
    q = torch.randn(2, 4, 48, 8, generator=torch.Generator().manual_seed(0))
    k, v = q[:, :2] + 1, q[:, 2:] - 1
    index = build_index([Pattern(Window(0, 1, 1), (1, 2, 2))] * 4, LAYOUT)
    index = in_order(index) if causal else index
    stop = None if lengths is None else until(index, *lengths)
    out = sparse_attention(
        q, k, v, index, row_stop=stop, scale=0.3, backend="gather", nan_guard=guard
    )
    return out, (q, *(x.repeat_interleave(2, 1) for x in (k, v)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, (30, 0)])
def test_such_heads_are_dense(broken_heads, causal, lengths):
    out, (q, k, v) = call(causal, lengths)
    mask = torch.ones(2, 1, 48, 48, dtype=torch.bool)
    if causal:
        mask = mask.tril()
    if lengths is not None:
        mask = mask & (torch.arange(48) < torch.tensor(lengths)[:, None])[:, None, None]
    logits = (q @ k.mT * 0.3).masked_fill(~mask, -torch.inf)
    dense = logits.softmax(-1).nan_to_num(0.0) @ v
    torch.testing.assert_close(out[:, 1:3], dense[:, 1:3])
    sparse = call(causal, lengths, guard=False)[0]
    assert torch.equal(out[:, [0, 3]], sparse[:, [0, 3]]) and not sparse.isfinite().all()


def test_it_is_said_once(broken_heads, caplog):
    call(), call()
    assert len(caplog.records) == 1 and "heads [1, 2]" in caplog.text


def test_nothing_happens_to_finite_heads(monkeypatch, caplog):
    monkeypatch.setattr(nan_guard, "scaled_dot_product_attention", lambda *_: pytest.fail("dense"))
    assert torch.equal(call()[0], call(guard=False)[0]) and not caplog.records


@pytest.fixture
def broken_first_head(monkeypatch):
    """The gather backend with NaN in head 0; gives the number of calls."""
    calls = []

    def forward(*arguments):
        got = right(*arguments)
        got.out[:, 0, 2] = torch.nan
        calls.append(arguments)
        return got

    right = attention.BACKENDS["gather"].forward
    monkeypatch.setattr(attention.BACKENDS["gather"], "forward", forward)
    monkeypatch.setattr(nan_guard, "_told", set())
    return calls


def test_in_a_patch_such_a_head_is_dense_and_copies_are_guarded_too(broken_first_head, caplog):
    pipe, call = wan()
    with patch(pipe, plan_for(pipe, DENSE, NARROW), backend="reference"):
        want = generate(pipe, call)  # what comes out if head 0 is dense
    with patch(pipe, plan_for(pipe, NARROW), backend="gather"):
        assert generate(pipe, call).isnan().any(), "off by default"
    calls = len(broken_first_head)
    with patch(pipe, plan_for(pipe, NARROW), backend="gather", nan_guard=True):
        torch.testing.assert_close(generate(pipe, call), want, rtol=1e-4, atol=1e-4)
        twin = copy.deepcopy(pipe)
        pickled = pickle.loads(pickle.dumps(pipe.transformer))
    assert len(broken_first_head) == 2 * calls > 0
    assert len(caplog.records) == 1 and "heads [0]" in caplog.text
    torch.testing.assert_close(generate(twin, call), want, rtol=1e-4, atol=1e-4)
    twin.transformer = pickled
    torch.testing.assert_close(generate(twin, call), want, rtol=1e-4, atol=1e-4)


def test_off_it_is_never_asked(monkeypatch):
    """So nothing waits for the device."""
    monkeypatch.setattr(attention, "finite_or_dense", lambda *_: pytest.fail("asked"))
    pipe, call = wan()
    with patch(pipe, plan_for(pipe, NARROW)) as handle:
        generate(pipe, call)
        assert handle.summary().sparse_calls > 0


def split(ring):
    return Split(LAYOUT, ring, 1, 0, 0, None)


def test_between_exchanges_it_guards_and_a_ring_is_refused(broken_first_head):
    index = build_index([Pattern(Window(0, 1, 1), (1, 2, 2))] * 2, LAYOUT)
    q, k, v = torch.randn(3, 1, 48, 2, 8, generator=torch.Generator().manual_seed(0))
    for guard in (False, True):
        out = _Chunks(split(1), index, None, "gather", guard)(None, q, k, v)
        assert isinstance(out, torch.Tensor)
        assert out.isfinite().all() == guard
    with pytest.raises(NotImplementedError, match=r"got ring_degree=2; use ulysses_degree alone"):
        split(2).attend(q, k, v, index, None, "gather", nan_guard=True)
