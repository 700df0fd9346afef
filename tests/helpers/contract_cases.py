"""What `docs/contract.md` says of every backend, as checks that take its name.

`test_contract.py` runs them for those that run anywhere; `test_flex.py` and `triton_interpreted.py` too.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from sparse_dit.attention import attend, block_mass, sparse_attention
from sparse_dit.backends.reference import token_mask
from sparse_dit.index import SparseIndex, build_index
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Skip, Window
from tests.helpers.kernel_cases import in_order, qkv, until
from tests.helpers.settings_cases import deterministic

LAYOUT = TokenLayout.video(2, 6, 8, text_after=5)
PATTERNS = [
    Pattern(Window(0, 0, 0), (1, 3, 4)),
    Pattern(Window(0, 0, 0), (1, 3, 4), far=True),
    Pattern(Dense()),
    Pattern(Skip()),
]
TOKENS = LAYOUT.seq_len


def index_of(*, causal: bool = False) -> SparseIndex:
    """Tiles of 12 tokens alone, with pooled keys, everything and nothing; text sees and is seen by all."""
    index = build_index(PATTERNS, LAYOUT)
    return in_order(index) if causal else index


def inputs(dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    """q, k and v, where two heads share a key head."""
    return qkv(index_of(), 16, batch=batch, kv_heads=2, dtype=dtype)


def wants(backend: str) -> dict[str, object]:
    """The results on request that a backend can give on the CPU."""
    return {} if backend == "flex" else {"return_lse": True, "mass_block": 16}


def assert_near(ours: Tensor, want: Tensor) -> None:
    """Equal but for rounding: products of other strides may add up in another order."""
    tolerance = 8 * torch.finfo(want.dtype).eps
    torch.testing.assert_close(ours, want, rtol=tolerance, atol=tolerance)


def check_autocast(backend: str) -> None:
    """It casts as PyTorch's attention does: everything but float64, to its own dtype, nothing when off."""
    index, (q, k, v) = index_of(), inputs(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        for mixed in ((q, k, v.to(dtype)), (q, k, v), (q.half(), k.bfloat16(), v)):
            want = attend(*(x.to(dtype) for x in mixed), index, backend=backend, **wants(backend))
            with torch.autocast("cpu", dtype=dtype):
                got = attend(*mixed, index, backend=backend, **wants(backend))
            assert got.out.dtype == dtype
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))
        with torch.autocast("cpu", dtype=dtype):
            assert sparse_attention(q, k, v, index, backend=backend).dtype == dtype
            if wants(backend):
                assert torch.equal(
                    block_mass(q, k, index, want.lse, mass_block=16, backend=backend),
                    block_mass(
                        q.to(dtype), k.to(dtype), index, want.lse, mass_block=16, backend=backend
                    ),
                )
            with torch.autocast("cpu", enabled=False):
                assert attend(q, k, v, index, backend=backend).out.dtype == torch.float32
                with pytest.raises(ValueError, match="share a floating dtype"):
                    attend(q, k, v.to(dtype), index, backend=backend)
            with contextlib.suppress(NotImplementedError):  # where there is no float64
                wide = attend(*(x.double() for x in (q, k, v)), index, backend=backend)
                assert wide.out.dtype == torch.float64


def check_strides(backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Each tensor of other strides, some of them 0; the numbers are those of contiguous ones."""
    index, (q, k, v) = index_of(), inputs(dtype, batch=1)
    ways = [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.repeat_interleave(2, 3)[..., ::2],
        lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    ]
    want = attend(q, k, v, index, backend=backend).out
    for number in range(len(ways)):
        mixed = [ways[(number + i) % len(ways)](x) for i, x in enumerate((q, k, v))]
        assert_near(attend(*mixed, index, backend=backend).out, want)
    q, k, v = (x.expand(2, -1, -1, -1) for x in (q, k[:, :1].expand_as(k), v[:, :1].expand_as(v)))
    want = attend(*(x.contiguous() for x in (q, k, v)), index, backend=backend).out
    got = attend(q, k, v, index, backend=backend).out
    assert_near(got, want)
    assert all(got.stride())


def check_modes(backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Deterministic mode, inference tensors, and tensors that ask for a gradient."""
    q, k, v = inputs(dtype)
    stop = until(index_of(), TOKENS, TOKENS - 9)

    def run(*tensors: Tensor, index: SparseIndex | None = None) -> Tensor:
        index = index or index_of()
        return attend(*tensors, index, row_stop=stop, backend=backend).out

    want = run(q, k, v)
    with deterministic():  # which fills new memory with NaN
        assert torch.equal(run(q, k, v), want)
    with torch.inference_mode():
        made_inside = [x.clone() for x in (q, k, v)], SparseIndex(index_of().entries, (0, 1, 2, 3))
        assert torch.equal(run(q, k, v), want)
        assert torch.equal(run(*made_inside[0], index=made_inside[1]), want)
    assert torch.equal(run(*made_inside[0], index=made_inside[1]), want)
    assert torch.equal(run(q, k, v, index=made_inside[1]), want)
    q = q.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(run(q, k, v), want)
    with pytest.raises(ValueError, match="for inference"):
        run(q, k, v)


def check_nan(
    backend: str,
    dtype: torch.dtype = torch.float32,
    *,
    causal: bool = False,
    odd: tuple[str, ...] = ("keys", "values"),
    shows: bool = True,
) -> None:
    """A key or value of NaN or Inf shows in the rows that see it and changes no bit of the others (under
    causal order, nothing but last bits).

    Args:
        odd: What is made NaN or Inf.
        shows: Whether it must show at all.
    """
    index, (q, k, v) = index_of(causal=causal), inputs(dtype)
    token = 30  # of the video: some rows of the first head see it, others don't
    clean = attend(q, k, v, index, backend=backend, **wants(backend))
    sees = torch.stack([_sees(index, head)[:, token] for head in range(len(PATTERNS))])
    assert sees[:3].any(1).all() and not sees[0].all()
    for value in (torch.nan, torch.inf, -torch.inf):
        for name in odd:
            bad = {"keys": k.clone(), "values": v.clone()}
            bad[name][:, :, token] = value
            got = attend(q, bad["keys"], bad["values"], index, backend=backend, **wants(backend))
            finite = got.out.isfinite().all(-1)
            unseen = (~sees).expand_as(finite)
            assert finite[unseen].all()
            near = {"rtol": 1e-5, "atol": 2e-6} if causal else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(got.out[unseen], clean.out[unseen], **near)
            if shows and (name == "values" or value != value):
                assert not finite[~unseen].any()
            if got.lse is not None:
                torch.testing.assert_close(got.lse[unseen], clean.lse[unseen], **near)


def check_padding(backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Padding may hold anything: nothing of it shows, in the output, the LSE, the mass or pooled keys."""
    index, (q, k, v) = index_of(), inputs(dtype)
    valid = 40  # in a cell that holds padding too
    stop = until(index, valid, TOKENS)
    clean = attend(q, k, v, index, row_stop=stop, backend=backend, **wants(backend))
    bad_q = q.clone()
    bad_q[0, :, valid:] = torch.nan  # so that heads come out with NaN and are computed dense
    for value in (torch.nan, torch.inf, -torch.inf):
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[0, :, valid:] = bad_v[0, :, valid:] = value
        got = attend(q, bad_k, bad_v, index, row_stop=stop, backend=backend, **wants(backend))
        assert clean.out.isfinite().all()
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, clean, strict=True))
        guarded = sparse_attention(
            bad_q, bad_k, bad_v, index, row_stop=stop, backend=backend, nan_guard=True
        )
        assert guarded[0, :, :valid].isfinite().all() and guarded[1].isfinite().all()
        if got.lse is not None:
            mass = block_mass(
                q, bad_k, index, got.lse, row_stop=stop, mass_block=16, backend=backend
            )
            torch.testing.assert_close(mass, clean.mass, rtol=1e-4, atol=1e-5)


def check_empty(backend: str, dtype: torch.dtype = torch.float32) -> None:
    """No batch items: results of that shape, as from PyTorch's attention."""
    index, (q, k, v) = index_of(), inputs(dtype, batch=0)
    got = attend(q, k, v, index, backend=backend, **wants(backend))
    assert got.out.shape == q.shape and got.out.dtype == dtype
    if wants(backend):
        assert got.lse.shape == q.shape[:3] and got.lse.dtype == torch.float32
        want = (0, len(PATTERNS), index.max_groups, -(-TOKENS // 16))
        assert got.mass.shape == want and got.mass.dtype == torch.float32
        assert block_mass(q, k, index, got.lse, mass_block=16, backend=backend).shape == want


def _sees(index: SparseIndex, head: int) -> Tensor:
    """Which tokens' keys reach a row, alone or in a cell, bool `[N, M]`."""
    entry = index.entries[index.head_to_pattern[head]]
    exact, pooled = token_mask(entry)
    if index.rows is not None:
        exact &= torch.arange(TOKENS) <= torch.arange(TOKENS)[:, None]
    if pooled is None or entry.far is None:
        return exact
    cells = torch.zeros(pooled.shape[1], TOKENS, dtype=torch.bool)
    for cell, (start, stop) in enumerate(
        zip(entry.far.cell_offsets, entry.far.cell_offsets[1:], strict=False)
    ):
        tokens = entry.key_tokens[start:stop]
        cells[cell, tokens] = True
        if index.rows is not None:
            pooled[:, cell] &= torch.arange(TOKENS) >= tokens.max()
    return exact | (pooled.float() @ cells.float() > 0)
