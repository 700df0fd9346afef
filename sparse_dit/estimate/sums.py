"""How much of sampled rows' probability each column and each diagonal holds.

Letters in shapes: B batch, H heads, N query tokens, M key tokens, D channels, L listed heads, R sampled rows,
C bins of 64 offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.cpu import estimates
from .rows import BIN, CallRows


@dataclass(frozen=True, eq=False)
class SampledSums:
    """Sums over sampled rows.

    Args:
        columns: float32 `[B, L, M]`: the probability that the rows give each key, at least `local` keys back.
        diagonals: float32 `[B, L, C]`: what they give to keys 0 to 63 back of their own, 64 to 127, ...
        sample: The rows.
        local: Keys less far back of a row's own count for no column: where a diagonal is chosen anyway, a
            sampled row's neighbours would pass for columns.
    """

    columns: Tensor
    diagonals: Tensor
    sample: CallRows
    local: int = 0

    def means(self) -> tuple[Tensor, Tensor]:
        """The same per row that sees the column, `[B, L, M]`, and per row that has the bin, `[B, L, C]`.

        A bin of which a row sees a half counts as half a row, and all counts as at least one row.
        """
        rows, bins = self._counts()
        return _mean(self.columns, rows[:, None]), _mean(self.diagonals, bins[:, None])

    def means_of_all(self) -> tuple[Tensor, Tensor]:
        """The same over the rows of all batch items: `[L, M]` and `[L, C]`."""
        rows, bins = (x.sum(0) for x in self._counts())
        return _mean(self.columns.sum(0), rows), _mean(self.diagonals.sum(0), bins)

    def _counts(self) -> tuple[Tensor, Tensor]:
        """How many rows see each column and have each bin: `[B, M]` and `[B, C]`."""
        shape = (len(self.columns), -1)
        seen, pairs = self.sample.column_rows(self.local), self.sample.diagonal_pairs
        return seen.expand(shape), pairs.expand(shape) / BIN


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return total / count.clamp_min(1)


def sampled_sums(
    q: Tensor,
    k: Tensor,
    sample: CallRows,
    *,
    scale: float,
    heads: Sequence[int] | None = None,
    local: int = 0,
) -> SampledSums:
    """Sums of one layer.

    Rows whose probabilities aren't finite, for a NaN or Inf in their logits, count as rows without any.

    Args:
        q: `[B, H, N, D]`, any strides.
        k: `[B, num_kv_heads, M, D]`, any strides; H must be a multiple of `num_kv_heads`.
        sample: Which rows, of one batch item or of B; see `sample_rows`.
        scale: Factor of the logits.
        heads: Which heads, ascending; None for all.
        local: See `SampledSums`.
    """
    heads = range(q.shape[1]) if heads is None else heads
    if q.is_cpu and estimates.takes(q):
        columns, diagonals = estimates.sums(
            q, k, sample.rows, sample.start, sample.stop, heads=heads, scale=scale, local=local
        )
        return SampledSums(columns, diagonals, sample, local)
    return SampledSums(*sums_by_torch(q, k, sample, scale, heads, local), sample, local)


def sums_by_torch(
    q: Tensor, k: Tensor, sample: CallRows, scale: float, heads: Sequence[int], local: int = 0
) -> tuple[Tensor, Tensor]:
    """`columns` and `diagonals` by PyTorch, where the kernel's library doesn't take the tensors."""
    batch, group = q.shape[0], q.shape[1] // k.shape[1]
    rows, start, stop = (
        x.to(q.device).long().expand(batch, -1) for x in (sample.rows, sample.start, sample.stop)
    )
    key = torch.arange(sample.num_keys, device=q.device)
    hidden = (key < start[..., None]) | (key >= stop[..., None])  # [B, R, M]
    offsets = rows[..., None] + sample.offset - key
    bins = torch.where(hidden, 0, offsets // BIN)
    columns, diagonals = [], []
    for head in heads:
        index = rows[..., None].expand(-1, -1, q.shape[-1])
        part = q[:, head].gather(1, index).to(_wide(q))
        logits = part @ k[:, head // group].transpose(1, 2).to(_wide(k)) * scale
        p = logits.masked_fill_(hidden, -torch.inf).softmax(-1)
        p = torch.where(p.isfinite().all(-1, keepdim=True), p, 0)
        columns.append(p.masked_fill(offsets < local, 0).sum(1))
        into = p.new_zeros(batch, -(-sample.num_keys // BIN))
        diagonals.append(into.scatter_add_(1, bins.flatten(1), p.flatten(1)))
    return torch.stack(columns, 1).float().cpu(), torch.stack(diagonals, 1).float().cpu()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
