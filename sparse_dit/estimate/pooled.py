"""Blocks of keys whose means suit mean queries: MInference's block-sparse, FlexPrefill's query-aware heads.

Letters in shapes: B batch, H heads, L listed heads, N query tokens, M key tokens, D channels, G groups of 64
rows, K blocks of 64 keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..entry import PatternIndex
from ..index import runs_of
from ..patterns.estimated import PooledBlocks, Share
from .budget import fewest
from .rows import BIN, CallRows
from .runs import GROUP, entries_of, group_bounds


def pooled_entries(
    q: Tensor,
    k: Tensor,
    call: CallRows,
    heads: Sequence[int],
    shape: PooledBlocks,
    scale: float,
    keys: Tensor | None = None,
) -> list[PatternIndex]:
    """An index for each listed head, of the blocks that suit all batch items the most.

    Args:
        q: `[B, H, N, D]`, any strides.
        k: `[B, num_kv_heads, M, D]`, any strides.
        call: All rows.
        heads: Which heads, ascending.
        shape: How much is chosen.
        scale: Factor of the logits.
        keys: Bool `[M]`: keys that may be chosen, whose number is the budget's length; None for all.
    """
    seen = _visible(call)
    length = call.num_keys
    if keys is not None:
        length = int(keys.sum())
        pad = torch.nn.functional.pad(keys, (0, -call.num_keys % BIN))
        seen = seen & pad.unflatten(0, (-1, BIN)).any(-1)
    p = pooled_probabilities(q, k, heads, seen, scale).mean(0)
    seen = seen.any(0)
    forced = _forced(call, shape.sinks, shape.local)
    wanted = torch.full((len(seen),), -(-shape.budget.keys(length) // BIN))
    chosen = _best(p, forced, wanted) & (seen | forced)
    if isinstance(shape.budget, Share):
        chosen |= fewest(p, p, shape.budget.gamma)
    return block_entries(chosen, q.shape[2], call.num_keys)


def pooled_probabilities(
    q: Tensor, k: Tensor, heads: Sequence[int], seen: Tensor, scale: float
) -> Tensor:
    """Softmax over the blocks that a group sees, of mean queries and mean keys: float32 `[B, L, G, K]`.

    It is 0 where it isn't finite.

    Args:
        q, k, heads, scale: As for `pooled_entries`.
        seen: Bool `[B, G, K]`, or of one item for all.
    """
    group = q.shape[1] // k.shape[1]
    listed = torch.tensor(heads, device=q.device)
    mean_q, mean_k = block_means(q)[:, listed], block_means(k)[:, listed // group]
    logits = (mean_q @ mean_k.transpose(2, 3) * scale).float().cpu()
    p = logits.masked_fill_(~seen[:, None], -torch.inf).softmax(-1)
    return p.nan_to_num_(0, 0, 0)


def block_means(x: Tensor) -> Tensor:
    """Means of 64 tokens, the last of fewer: `[B, H, blocks, D]`, in float32 or better."""
    wide = torch.promote_types(x.dtype, torch.float32)
    whole = x.shape[2] // BIN * BIN
    parts = [x[:, :, :whole].unflatten(2, (-1, BIN)).mean(3, dtype=wide)]
    if whole < x.shape[2]:
        parts.append(x[:, :, whole:].mean(2, keepdim=True, dtype=wide))
    return torch.cat(parts, 2)


def _visible(call: CallRows) -> Tensor:
    """Which blocks hold a key that a row of each group sees, as far as intervals tell: bool `[B, G, K]`."""
    rows, pad = call.start.shape[1], -call.start.shape[1] % GROUP
    none = call.start >= call.stop
    start = torch.nn.functional.pad(
        call.start.masked_fill(none, call.num_keys), (0, pad), value=call.num_keys
    )
    stop = torch.nn.functional.pad(call.stop.masked_fill(none, 0), (0, pad))
    assert rows + pad == start.shape[1]
    start, stop = (x.unflatten(1, (-1, GROUP)) for x in (start, stop))
    first = torch.arange(0, call.num_keys, BIN)
    return (first + BIN > start.amin(-1)[..., None]) & (first < stop.amax(-1)[..., None])


def _forced(call: CallRows, sinks: int, local: int) -> Tensor:
    """Blocks with a sink, or with one of the keys up to `local` before one of the group's: bool `[G, K]`."""
    bounds = group_bounds(call.rows.shape[1]) + call.offset
    first = torch.arange(0, call.num_keys, BIN)
    near = (first + BIN > bounds[:-1, None] - local) & (first < bounds[1:, None])
    found = torch.nn.functional.pad(call.sinks(sinks), (0, -call.num_keys % BIN))
    return near | (found.unflatten(0, (-1, BIN)).any(-1) & (first < bounds[1:, None]))


def _best(p: Tensor, forced: Tensor, wanted: Tensor) -> Tensor:
    """The `wanted` blocks of each group with the highest `p`, forced ones first and all of them."""
    order = p.masked_fill(forced, torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(p.shape[-1]) < wanted[:, None]
    return torch.zeros_like(p, dtype=torch.bool).scatter_(-1, order, rank.expand(p.shape)) | forced


def block_entries(chosen: Tensor, num_queries: int, num_keys: int) -> list[PatternIndex]:
    """Entries of chosen blocks, bool `[L, G, K]`, cut at each group's last row."""
    heads, groups, _ = chosen.shape
    stop = (group_bounds(num_queries)[1:] + num_keys - num_queries).repeat(heads)
    row, first, last = runs_of(chosen.flatten(0, 1))
    start, end = first * BIN, (last * BIN).minimum(stop[row])
    counts = torch.bincount(row, minlength=heads * groups).view(heads, groups)
    offsets = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
    runs = torch.stack([start, end - start], 1)
    return entries_of(offsets.int(), runs.int(), num_queries, num_keys)
