"""Queries and keys with something to find, and what a plain softmax says of them."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_dit.index import SparseIndex


def tensors(
    n: int, m: int, *, batch: int = 1, heads: int = 4, kv_heads: int = 2, dim: int = 16
) -> tuple[Tensor, Tensor]:
    """q `[B, H, N, D]` with its heads inside of its tokens, as hosts have them, and k."""
    generator = torch.Generator().manual_seed(n * 1000 + m)
    q = torch.randn(batch, n, heads, dim, generator=generator).transpose(1, 2)
    return q, torch.randn(batch, kv_heads, m, dim, generator=generator)


def probabilities(q: Tensor, k: Tensor, scale: float, start: Tensor, stop: Tensor) -> Tensor:
    """float64 `[B, H, N, M]` of rows that see keys from start to stop, `[B, N]`; 0 for one that sees none."""
    key = torch.arange(k.shape[2])
    seen = (key >= start[:, None, :, None]) & (key < stop[:, None, :, None])
    wide = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q.double() @ wide.transpose(2, 3) * scale
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)


def covers(index: SparseIndex) -> Tensor:
    """What each head's rows see of the index, causal order included: bool `[H, N, M]`."""
    seen = torch.zeros(index.num_heads, index.num_queries, index.num_keys, dtype=torch.bool)
    for head, place in enumerate(index.head_to_pattern):
        entry = index.entries[place]
        for g in range(entry.num_groups):
            rows = slice(int(entry.q_offsets[g]), int(entry.q_offsets[g + 1]))
            for start, length in entry.runs[
                entry.run_offsets[g] : entry.run_offsets[g + 1]
            ].tolist():
                seen[head, rows, start : start + length] = True
    assert index.rows is not None and index.rows.stop is not None
    return seen & (torch.arange(index.num_keys) < index.rows.stop[:, None])
