"""What the tests of kernels share: inputs, indices made by hand, and error bounds.

The bounds follow from rounding, element by element. u is the unit roundoff of float32, D the head_dim, L
an upper bound of a row's logits (|q| * largest |k| * scale), b the log of the largest cell, A the row's
attention to |v|. A logit is wrong by a few u * L (its products, and the scale folded into q), and as its
D sums wander, by about u * sqrt(D) / 2 * L, and, as sums may start from b, u * sqrt(D) * b; a weight by as
much plus the error of exp; sums of weights and of weighted values add a few u; the output is rounded once
to its dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_dit.attention import attend
from sparse_dit.backends.attended import Attended
from sparse_dit.index import FarField, PatternIndex, SparseIndex, build_index
from sparse_dit.intervals import causal_rows, valid_rows
from sparse_dit.layout import TokenLayout
from tests.helpers.cases import PATTERN_CASES

UNIT = 2.0**-24
SUMS, LOGITS = 16.0, 4.0  # the "few" of the bound: units for sums and exp, units of L
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def randn(*shape: int, seed: int = 0, size: float = 1.5, low: bool = True) -> Tensor:
    """Normal float32 numbers; with `low` only those that bfloat16 and float16 hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * size
    if not low:
        return x
    x = x.bfloat16().float()
    return torch.where(x.abs() < 2.0**-14, 0.0, x)


def qkv(
    index: SparseIndex,
    dim: int,
    *,
    batch: int = 1,
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    size: float = 1.5,
) -> list[Tensor]:
    """q, k and v for an index; the same numbers in each dtype."""
    heads = index.num_heads
    kv_heads = heads if kv_heads is None else kv_heads
    shapes = [(heads, index.num_queries)] + [(kv_heads, index.num_keys)] * 2
    return [
        randn(batch, h, n, dim, seed=3 * seed + i, size=size).to(dtype)
        for i, (h, n) in enumerate(shapes)
    ]


def entry(
    m: int,
    groups: Sequence[int],
    keys: Sequence[Sequence[int] | Tensor],
    *,
    q_order: Tensor | None = None,
    k_order: Tensor | None = None,
    cells: Sequence[int] | Tensor | None = None,
    pooled: Sequence[Sequence[int] | Tensor] | None = None,
) -> PatternIndex:
    """An index made by hand.

    Args:
        m: Number of keys.
        groups: Rows of each group.
        keys: For each group the sorted key positions that it sees, ascending.
        q_order, k_order: Token at each sorted position.
        cells: Where cells start, and where the last ends.
        pooled: For each group the cells that it sees pooled, ascending.
    """
    runs, run_offsets = _runs(keys)
    far = None
    if cells is not None and pooled is not None:
        far_runs, far_offsets = _runs(pooled)
        far = FarField(torch.as_tensor(cells).int(), far_offsets, far_runs)
    q_offsets = _offsets(groups)
    orders = [None if x is None else x.int() for x in (q_order, k_order)]
    return PatternIndex(sum(groups), m, *orders, q_offsets, run_offsets, runs, far)


def one_head(e: PatternIndex, heads: int = 1, **keywords: object) -> SparseIndex:
    """An index whose heads all use one entry."""
    return SparseIndex((e,), (0,) * heads, **keywords)


def in_order(index: SparseIndex, offset: int = 0) -> SparseIndex:
    """The index in causal order, whose row n sees keys up to `n + offset`."""
    return replace(index, rows=causal_rows(index.num_queries, index.num_keys, offset))


def until(index: SparseIndex, *lengths: int) -> Tensor:
    """`row_stop` of a call where keys are padding from these numbers on, one a batch item."""
    stop = valid_rows(torch.tensor(lengths), index.num_queries).stop
    assert stop is not None
    return stop


def dense(n: int, m: int, group: int | None = None) -> PatternIndex:
    """Every row sees every key; in groups of `group` rows, or in one."""
    sizes = [n] if group is None else split(n, group)
    return entry(m, sizes, [range(m)] * len(sizes))


def split(n: int, group: int) -> list[int]:
    """n rows in groups of `group`, the last ragged."""
    return [min(group, n - start) for start in range(0, n, group)]


def _offsets(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).int()


def _runs(lists: Sequence[Sequence[int] | Tensor]) -> tuple[Tensor, Tensor]:
    """Ascending numbers as runs `[R, 2]` (start, length), and CSR offsets."""
    runs, counts = [torch.zeros(0, 2, dtype=torch.int64)], []
    for numbers in lists:
        x = torch.as_tensor(numbers, dtype=torch.int64)
        first = torch.ones(len(x), dtype=torch.bool)
        first[1:] = x.diff() > 1
        starts = first.nonzero()[:, 0]
        ends = torch.cat([starts[1:], torch.tensor([len(x)])])[: len(starts)]
        runs.append(torch.stack([x[starts], ends - starts], 1))
        counts.append(len(starts))
    return torch.cat(runs).int(), _offsets(counts)


class Case(NamedTuple):
    """Some of `PATTERN_CASES` as heads of one index, with inputs and what must come out."""

    index: SparseIndex
    inputs: list[Tensor]
    row_stop: Tensor | None
    truth: tuple[Attended, Tensor]


@functools.cache  # every backend, variant and dtype is compared with the same truth
def pattern_case(layout: TokenLayout, causal: bool, first: int, padded: bool) -> Case:
    """Six patterns from `first` on, three key heads, two batch items."""
    patterns = (PATTERN_CASES[first : first + 6] * 6)[:6]
    index = build_index(patterns, layout, group=32)
    index = in_order(index, 2) if causal else index
    n = layout.seq_len
    row_stop = until(index, n, max(0, n - 5)) if padded else None
    inputs = qkv(index, 8, batch=2, kv_heads=3, seed=first)
    return Case(index, inputs, row_stop, truth_of(*inputs, index, row_stop=row_stop, mass_block=16))


def truth_of(
    q: Tensor, k: Tensor, v: Tensor, index: SparseIndex, **keywords: object
) -> tuple[Attended, Tensor]:
    """The reference in float64, with LSE; and the same attention to |v|."""
    q, k, v = q.double(), k.double(), v.double()
    dim = v.shape[-1]
    keywords |= {"backend": "reference", "return_lse": True}
    want = attend(q, k, torch.cat([v, v.abs()], -1), index, **keywords)
    return want._replace(out=want.out[..., :dim]), want.out[..., dim:]


def logit_bound(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Float64 `[B, H, N]`: no logit of a row is larger than this."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    largest = k.double().norm(dim=-1).amax(-1)  # [B, H_kv]
    largest = largest.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return q.double().norm(dim=-1) * largest[..., None] * abs(scale)


def relative(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    index: SparseIndex | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Float64 `[B, H, N]`: the relative error that a row's sums of weights may have.

    Args:
        index: Its cells count.
        lse: Of an earlier call, for weights that are made with it: sums start from it.
    """
    wander = q.shape[-1] ** 0.5
    logits = max(LOGITS, wander / 2) * logit_bound(q, k, scale)
    fars = [] if index is None else [e.far for e in index.entries if e.far is not None]
    cells = [
        far.cell_offsets.diff().clamp_min(1).max() for far in fars if len(far.cell_offsets) > 1
    ]
    logits += 3 * wander * max([0.0, *(c.log().item() for c in cells)])
    if lse is not None:
        logits += 3 * wander * lse.double().abs().nan_to_num(posinf=0.0)
    return UNIT * (SUMS + logits)


def assert_close(
    ours: Attended,
    inputs: Sequence[Tensor],
    index: SparseIndex,
    *,
    truth: tuple[Attended, Tensor] | None = None,
    rounds_weights: bool = False,
    **keywords: object,
) -> float:
    """Every element within its bound; returns the largest error over its bound.

    Args:
        ours: What the kernel made of `inputs` (q, k, v) and `index`, with `keywords`.
        truth: Result of `truth_of` for these; made here if None.
        rounds_weights: Whether the kernel rounds softmax weights to the dtype of v.
    """
    q, k, v = inputs
    want, mean = truth or truth_of(q, k, v, index, **keywords)
    share = relative(q, k, keywords.get("scale"), index)
    info = torch.finfo(v.dtype)
    weights = info.eps / 2 if rounds_weights else 0.0
    bound = (share[..., None] + weights) * mean + info.eps / 2 * want.out.abs()
    # a weight may be off by 2**-126, the least that exp tells from 0, and a sum by denormals
    tiny = 2.0**-126 * v.double().abs().max() + 2.0**-149
    bound += info.smallest_normal * info.eps + index.num_keys * tiny
    if rounds_weights:
        bound += 2 * info.smallest_normal  # such instructions take denormals, of sums too, for 0
    assert ours.out.dtype == v.dtype and ours.out.shape == want.out.shape
    worst = _within(ours.out.double(), want.out, bound, "out")
    if ours.lse is not None:
        empty = want.lse.isneginf()
        assert torch.equal(ours.lse.isneginf(), empty), "lse is -inf elsewhere"
        mine, yours = (x.double().masked_fill(empty, 0) for x in (ours.lse, want.lse))
        worst = max(worst, _within(mine, yours, share + 2 * UNIT * yours.abs(), "lse"))
    if ours.mass is not None:
        assert ours.mass.dtype == torch.float32
        largest = share.amax(-1)[..., None, None]
        bound = 2 * largest * want.mass.double() + 1e-30
        worst = max(worst, _within(ours.mass.double(), want.mass.double(), bound, "mass"))
    return worst


def assert_close_pooled(
    ours: Attended, inputs: Sequence[Tensor], index: SparseIndex, **keywords: object
) -> float:
    """As `assert_close` where keys are pooled in low precision; returns the largest error over its bound.

    Means of keys are rounded too, once: a logit may be wrong by as much as that.
    """
    want, mean = truth_of(*inputs, index, **keywords)
    rounding = torch.finfo(inputs[2].dtype).eps / 2 * (1 + logit_bound(*inputs[:2]))
    empty = want.lse.isneginf()
    assert torch.equal(ours.lse.isneginf(), empty), "lse is -inf elsewhere"
    lse, right = (x.double().masked_fill(empty, 0) for x in (ours.lse, want.lse))
    worst = _within(lse, right, rounding, "lse")
    bound = 3 * rounding[..., None] * (mean + 0.1)
    return max(worst, _within(ours.out.double(), want.out, bound, "out"))


def _within(ours: Tensor, want: Tensor, bound: Tensor, name: str) -> float:
    assert want.isfinite().all(), f"{name} of the reference isn't finite"
    assert ours.shape == want.shape, f"{name} has shape {list(ours.shape)}"
    ratio = (ours - want).abs() / bound
    ratio = torch.where(ours == want, 0.0, ratio)
    bad = ~(ratio <= 1)
    if bad.any():
        place = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(place)} is {ours[place]}, should be {want[place]} to {bound[place]:.2e}; "
            f"{int(bad.sum())} of {bad.numel()} are wrong"
        )
    return ratio.max().item() if ratio.numel() else 0.0
