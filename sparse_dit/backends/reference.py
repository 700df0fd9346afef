"""The specification: an index expanded to a token mask, in a few lines of PyTorch.

Slow, and of size N x M: for tests and for reading. Computes in float32, float64 in float64; give it that
for an oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..index import FarField, PatternIndex, SparseIndex, expand, last_tokens
from ..on_cpu import on_cpu
from .attended import Attended


def unsupported(q: Tensor, index: SparseIndex) -> str | None:
    """The reference runs everything."""
    return None


@on_cpu
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    kv_len: Tensor | None,
    scale: float,
    return_lse: bool,
    mass_block: int | None,
) -> Attended:
    """Attention over `[B, H, N, D]`, on the CPU wherever `q` is; arguments as in `sparse_attention`."""
    device, dtype = q.device, q.dtype
    q, k, v = _wide(q), _wide(k), _wide(v)
    batch, heads, n, _ = q.shape
    group_size = heads // k.shape[1]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_zeros(batch, heads, n)
    masses = [[None] * heads for _ in range(batch)]
    for b in range(batch):
        valid = k.shape[2] if kv_len is None else int(kv_len[b])
        for h, pattern in enumerate(index.head_to_pattern):
            entry = index.entries[pattern].to("cpu")
            kh, vh = k[b, h // group_size], v[b, h // group_size]
            logits, values, seen = _logits(q[b, h], kh, vh, entry, index, valid, scale)
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
    kv_len: Tensor | None,
    scale: float,
    mass_block: int,
) -> Tensor:
    """Mass from a cached LSE; arguments as in `sparse_dit.attention.block_mass`."""
    device = q.device
    q, k, lse = _wide(q), _wide(k), lse.cpu()
    batch, heads, num_keys = q.shape[0], q.shape[1], k.shape[2]
    masses = [[q] * heads for _ in range(batch)]
    for b in range(batch):
        valid = num_keys if kv_len is None else int(kv_len[b])
        for h, pattern in enumerate(index.head_to_pattern):
            entry, kh = index.entries[pattern].to("cpu"), k[b, h // (heads // k.shape[1])]
            logits, _, _ = _logits(q[b, h], kh, kh, entry, index, valid, scale)
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
    index: SparseIndex,
    valid: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[N, M + C]` of all keys, exact and pooled, -inf where not seen; their values; what is seen."""
    exact, pooled = token_mask(entry)
    last_row = torch.arange(entry.num_queries) + index.causal_offset
    tokens = torch.arange(entry.num_keys)
    exact &= tokens < valid
    if index.causal:
        exact &= tokens <= last_row[:, None]
    logits = (q @ k.T * scale).masked_fill(~exact, float("-inf"))
    if entry.far is None or pooled is None:
        return logits, v, exact
    means, values, sizes = _pooled(k, v, entry, entry.far, valid)
    last = last_tokens(entry.far, entry.key_tokens, valid)
    pooled &= last >= 0
    if index.causal:
        pooled &= last <= last_row[:, None]
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
    k: Tensor, v: Tensor, entry: PatternIndex, far: FarField, valid: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean key and value `[C, D]` of the valid tokens of each cell, and their number `[C]`."""
    order = entry.key_tokens
    means, values, sizes = [], [], []
    for start, stop in zip(
        far.cell_offsets[:-1].tolist(), far.cell_offsets[1:].tolist(), strict=True
    ):
        tokens = order[start:stop]
        tokens = tokens[tokens < valid]
        means.append(k[tokens].sum(0) / max(1, len(tokens)))
        values.append(v[tokens].sum(0) / max(1, len(tokens)))
        sizes.append(len(tokens))
    return torch.stack(means), torch.stack(values), torch.tensor(sizes).to(k)


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
