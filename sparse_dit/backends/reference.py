"""The specification: an index expanded to a token mask, in a few lines of PyTorch.

Slow, and of size N x M: for tests and for reading. Computes in float32, float64 in float64; give it that
for an oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import valid_cells
from ..entry import FarField, PatternIndex, expand
from ..index import SparseIndex
from ..intervals import RowIntervals
from ..on_cpu import on_cpu
from .attended import Attended


def unsupported(q: Tensor, index: SparseIndex) -> str | None:
    """The reference runs everything."""
    return None


def unsupported_values(width: int) -> str | None:
    """The reference takes values of any width."""
    return None


@on_cpu
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    rows: RowIntervals | None,
    scale: float,
    return_lse: bool,
    mass_block: int | None,
) -> Attended:
    """Attention over `[B, H, N, D]`, on the CPU wherever `q` is; arguments as in `sparse_attention`."""
    device, dtype = q.device, q.dtype
    q, k, v = _wide(q), _wide(k), _wide(v)
    batch, heads, n, _ = q.shape
    group_size = heads // k.shape[1]
    out = q.new_zeros(batch, heads, n, v.shape[-1])
    seen_by = _bounds(rows, batch, n, k.shape[2])
    lse = q.new_zeros(batch, heads, n)
    masses: list[list[Tensor]] = [[q.new_zeros(0)] * heads for _ in range(batch)]
    for b in range(batch):
        for h, pattern in enumerate(index.head_to_pattern):
            entry = index.entries[pattern].to("cpu")
            kh, vh = k[b, h // group_size], v[b, h // group_size]
            logits, values, seen = _logits(q[b, h], kh, vh, entry, seen_by[b], scale)
            lse[b, h] = logits.logsumexp(-1)
            weights = _softmax(logits, lse[b, h])
            out[b, h] = _weighted(weights, values, seen)
            if mass_block:
                masses[b][h] = _mass(weights[:, : k.shape[2]], entry, mass_block)
    mass = _stack(masses, index.max_groups).to(device) if mass_block else None
    lse = lse.float().to(device) if return_lse else None
    return Attended(out.to(device, dtype), lse, mass)


@on_cpu
def block_mass(
    q: Tensor,
    k: Tensor,
    index: SparseIndex,
    lse: Tensor,
    rows: RowIntervals | None,
    scale: float,
    mass_block: int,
) -> Tensor:
    """Mass from a cached LSE; arguments as in `sparse_dit.attention.block_mass`."""
    device = q.device
    q, k, lse = _wide(q), _wide(k), lse.cpu()
    batch, heads, num_keys = q.shape[0], q.shape[1], k.shape[2]
    masses = [[q] * heads for _ in range(batch)]
    seen_by = _bounds(rows, batch, q.shape[2], num_keys)
    for b in range(batch):
        for h, pattern in enumerate(index.head_to_pattern):
            entry, kh = index.entries[pattern].to("cpu"), k[b, h // (heads // k.shape[1])]
            logits, _, _ = _logits(q[b, h], kh, kh, entry, seen_by[b], scale)
            row = lse[b, h, :, None]
            weights = (logits[:, :num_keys] - row).exp().masked_fill(row.isneginf(), 0.0)
            masses[b][h] = _mass(weights, entry, mass_block)
    return _stack(masses, index.max_groups).to(device)


@on_cpu
def token_mask(entry: PatternIndex) -> tuple[Tensor, Tensor | None]:
    """What an entry computes, in token numbers: bool `[N, M]` exact, and `[N, C]` pooled or None."""
    q_order, k_order = (
        entry.query_tokens,
        entry.key_tokens,
    )
    exact = torch.zeros(entry.num_queries, entry.num_keys, dtype=torch.bool)
    num_cells = 0 if entry.far is None else len(entry.far.cell_offsets) - 1
    pooled = torch.zeros(entry.num_queries, num_cells, dtype=torch.bool)
    for group in range(entry.num_groups):
        rows = q_order[entry.q_offsets[group] : entry.q_offsets[group + 1]]
        keys = expand(entry.runs[entry.run_offsets[group] : entry.run_offsets[group + 1]])
        exact[rows[:, None], k_order[keys]] = True
        if entry.far is not None:
            offsets = entry.far.run_offsets
            cells = expand(entry.far.runs[offsets[group] : offsets[group + 1]])
            pooled[rows[:, None], cells] = True
    return exact, None if entry.far is None else pooled


def _logits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    entry: PatternIndex,
    seen_by: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[N, M + C]` of all keys, exact and pooled, -inf where not seen; their values; what is seen."""
    exact, pooled = token_mask(entry)
    start, stop = seen_by[..., None]
    tokens = torch.arange(entry.num_keys)
    exact &= (start <= tokens) & (tokens < stop)
    logits = (q @ k.T * scale).masked_fill(~exact, float("-inf"))
    if entry.far is None or pooled is None:
        return logits, v, exact
    valid = RowIntervals(*seen_by).valid(entry.num_keys, entry.num_queries)[0]
    means, values, sizes = _pooled(k, v, entry, entry.far, valid)
    cells = valid_cells(entry, valid)
    pooled &= (cells.size > 0) & (start <= cells.first) & (cells.last < stop)
    far = (q @ means.T * scale + sizes.clamp_min(1).log()).masked_fill(~pooled, float("-inf"))
    return torch.cat([logits, far], 1), torch.cat([v, values]), torch.cat([exact, pooled], 1)


def _softmax(logits: Tensor, lse: Tensor) -> Tensor:
    """Weights `[N, K]`; those of a row that sees nothing, whose `lse` is -inf, are 0."""
    return logits.softmax(-1).masked_fill(lse.isneginf()[:, None], 0.0)


def _weighted(weights: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """Sums of values by weight, `[N, D]`; NaN and Inf count in the rows that see them, not times 0."""
    odd = ~values.isfinite().all(1)
    out = weights @ values.masked_fill(odd[:, None], 0.0)
    for row in (seen & odd).any(1).nonzero()[:, 0].tolist():
        out[row] = weights[row, seen[row]] @ values[seen[row]]
    return out


def _pooled(
    k: Tensor, v: Tensor, entry: PatternIndex, far: FarField, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean key and value `[C, D]` of the valid tokens of each cell, and their number `[C]`."""
    order = entry.key_tokens
    means, values, sizes = [], [], []
    for start, stop in zip(
        far.cell_offsets[:-1].tolist(), far.cell_offsets[1:].tolist(), strict=True
    ):
        tokens = order[start:stop]
        tokens = tokens[(valid[0] <= tokens) & (tokens < valid[1])]
        means.append(k[tokens].sum(0) / max(1, len(tokens)))
        values.append(v[tokens].sum(0) / max(1, len(tokens)))
        sizes.append(len(tokens))
    return torch.stack(means), torch.stack(values), torch.tensor(sizes).to(k)


def _bounds(rows: RowIntervals | None, batch: int, n: int, m: int) -> Tensor:
    """The intervals of all rows, written out: int32 `[B, 2, N]`."""
    if rows is None:
        return torch.tensor([0, m], dtype=torch.int32)[:, None].expand(batch, 2, n)
    both = (x.expand(batch, n) for x in rows.to("cpu").bounds(m, n))
    return torch.stack(tuple(both), 1)


def _wide(x: Tensor) -> Tensor:
    """A tensor moved to the CPU, in at least float32."""
    return x.to("cpu", torch.promote_types(x.dtype, torch.float32))


def _mass(weights: Tensor, entry: PatternIndex, block: int) -> Tensor:
    """Probability per query group and block of sorted keys, float32 `[G, ceil(M / block)]`."""
    rows = weights[entry.query_tokens]
    rows = rows[:, entry.key_tokens]
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % block))
    blocks = rows.view(len(rows), -1, block).sum(-1).float()
    owner = torch.repeat_interleave(torch.arange(entry.num_groups), entry.q_offsets.diff().long())
    return blocks.new_zeros(entry.num_groups, blocks.shape[1]).index_add_(0, owner, blocks)


def _stack(masses: list[list[Tensor]], groups: int) -> Tensor:
    pad = torch.nn.functional.pad
    return torch.stack(
        [torch.stack([pad(m, (0, 0, 0, groups - len(m))) for m in row]) for row in masses]
    )
