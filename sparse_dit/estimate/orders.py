"""Which token order a head has: the one in which what it would see errs the least, tried on a few rows.

Beside the orders stands one more way: every n-th key, which serves heads whose attention is flat.
Letters in shapes: B batch, H heads, N tokens, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..attention import sparse_attention
from ..entry import PatternIndex
from ..index import dense_index, index_of
from ..layout import Tile, TokenLayout
from ..on_cpu import on_cpu
from ..patterns import Budget, Pattern
from .blocks import blocks_of, bounds_of, part_of, sampled_entry, token_orders, tokens_of
from .blockwise import chosen_blocks
from .scores import pooled_logits, pooled_probabilities

GROUPS = 4  # of query rows, that orders are tried on
EVERY = 4  # of their rows
SAMPLED = None  # in the place of a tile: every n-th key

Order = Tile | None


@torch.no_grad()
def best_orders(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    patterns: Mapping[int, Pattern],
    layout: TokenLayout,
    scale: float,
) -> dict[int, tuple[Order, float]]:
    """For each listed head its order, and the squared relative error of the output in that; none with NaN.

    Args:
        q: `[B, H, N, D]`, any strides.
        k, v: `[B, num_kv_heads, N, D]`, any strides.
        patterns: By head: with `own_order`.
        layout: Where the N tokens lie.
        scale: Factor of the logits.
    """
    best: dict[int, tuple[Order, float]] = {}
    heads = range(q.shape[1])
    orders: tuple[Order, ...] = (*token_orders(layout), SAMPLED)
    trials = [_thinned(*_trial(q, k, order, patterns, layout, scale)) for order in orders]
    all_rows = torch.cat([rows for rows, _ in trials]).to(q.device)
    dense = dense_index(len(heads), len(all_rows), k.shape[2], q.device)
    exact = sparse_attention(q[:, :, all_rows], k, v, dense, scale=scale).float()
    parts = exact.split([len(rows) for rows, _ in trials], 2)
    for order, (rows, trial), want in zip(orders, trials, parts, strict=True):
        if not trial:
            continue
        one = next(iter(trial.values()))
        index = index_of({head: trial.get(head, _nothing(one)) for head in heads})
        index, rows = index if q.is_cpu else index.to(q.device), rows.to(q.device)
        got = sparse_attention(q[:, :, rows], k, v, index, scale=scale).float()
        error = (got - want).square().sum((0, 2, 3))
        share = (error / want.square().sum((0, 2, 3)).clamp_min(1e-30)).tolist()
        for head in trial:
            if math.isfinite(share[head]) and share[head] < best.get(head, (None, math.inf))[1]:
                best[head] = (order, share[head])
    return best


@on_cpu
def _trial(
    q: Tensor,
    k: Tensor,
    order: Order,
    patterns: Mapping[int, Pattern],
    layout: TokenLayout,
    scale: float,
) -> tuple[Tensor, dict[int, PatternIndex]]:
    """The rows that are tried in an order, int64, and what each head sees of them; none with NaN."""
    if order is SAMPLED:
        whole = {
            head: sampled_entry(layout, stride_of(of, layout)) for head, of in patterns.items()
        }
        one = next(iter(whole.values()))
        groups = _tried(one.num_groups)
        parts = {head: part_of(entry, groups) for head, entry in whole.items()}
        return tokens_of(one.query_tokens, one.q_offsets, groups), parts
    trial: dict[int, PatternIndex] = {}
    ordered = {head: replace(of, tile=order) for head, of in patterns.items()}
    blocks = blocks_of(next(iter(ordered.values())), layout)
    groups = _tried(len(blocks.groups.owner))
    rows = blocks.groups.owner[groups].unique()
    rows = rows[rows >= 0]
    for pattern in dict.fromkeys(ordered.values()):
        listed = [head for head, of in ordered.items() if of == pattern]
        blocks, shape = blocks_of(pattern, layout), pattern.shape
        logits, owner = pooled_logits(q, k, listed, blocks, scale, shape.parts, rows)
        p = pooled_probabilities(logits, owner, blocks).mean(0).cpu()
        p = p if p.shape[1] == len(rows) else p[:, rows]
        sound = p.isfinite().flatten(1).all(1)
        p = torch.where(sound[:, None, None], p, 0)
        chosen = torch.zeros(len(listed), blocks.num_blocks, blocks.num_blocks, dtype=torch.bool)
        chosen[:, rows] = chosen_blocks(p, shape, blocks, rows) | blocks.near(shape.local)[rows]
        laid = zip(listed, blocks.entries(chosen, groups), sound.tolist(), strict=True)
        trial |= {head: entry for head, entry, ok in laid if ok}
    return tokens_of(blocks.order.order, blocks.groups.offsets, groups), trial


def _thinned(
    rows: Tensor, trial: Mapping[int, PatternIndex]
) -> tuple[Tensor, dict[int, PatternIndex]]:
    """Every so many rows of each group of a trial, and the entries for these."""
    if not trial:
        return rows, {}
    offsets = next(iter(trial.values())).q_offsets.long()
    starts = torch.repeat_interleave(offsets[:-1], offsets.diff())
    kept = rows[(torch.arange(len(rows)) - starts) % EVERY == 0]
    fewer = bounds_of((offsets.diff() + EVERY - 1) // EVERY)
    return kept, {
        head: replace(entry, num_queries=len(kept), q_offsets=fewer, cache={})
        for head, entry in trial.items()
    }


def stride_of(pattern: Pattern, layout: TokenLayout) -> int:
    """The stride n at which a head that sees every n-th key costs what its blocks cost."""
    length, budget = layout.num_grid, pattern.shape.keep
    assert isinstance(budget, Budget), "own_order goes with a budget"
    keys = min(length, budget.keys(length))
    if pattern.far:
        keys += (length - keys) / length * blocks_of(pattern, layout).num_blocks
    return max(1, math.ceil(length / max(1.0, keys) - 0.01))


def _tried(count: int) -> Tensor:
    """int64: which of so many groups are tried, spread evenly."""
    step = max(1, count // GROUPS)
    return torch.arange(step // 2, count, step)


def _nothing(entry: PatternIndex) -> PatternIndex:
    """The entry whose rows see nothing."""
    none = torch.zeros_like(entry.run_offsets)
    return replace(entry, run_offsets=none, runs=entry.runs[:0], far=None, cache={})
