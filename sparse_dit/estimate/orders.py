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
from ..index import index_of
from ..layout import Tile, TokenLayout
from ..patterns import Budget, Pattern
from .blocks import blocks_of, restricted, sampled_entry, token_orders
from .blockwise import blockwise_entries

GROUPS = 4  # of query rows, that orders are tried on
SAMPLED = None  # in the place of a tile: every n-th key

Order = Tile | None


@torch.no_grad()
def best_orders(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    patterns: Mapping[int, Pattern],
    layout: TokenLayout,
    scale: float,
) -> dict[int, tuple[Order, float]]:
    """For each listed head its order, and the squared relative error of the output in that; none with NaN.

    Args:
        q: `[B, H, N, D]`, any strides.
        k, v: `[B, num_kv_heads, N, D]`, any strides.
        out: `[B, H, N, D]`: what dense attention gives.
        patterns: By head: with `own_order`.
        layout: Of the N tokens.
        scale: Factor of the logits.
    """
    best: dict[int, tuple[Order, float]] = {}
    heads = q.shape[1]
    nothing: PatternIndex | None = None
    for order in (*token_orders(layout), SAMPLED):
        trial: dict[int, PatternIndex] = {}
        for head, pattern in patterns.items():
            if order is SAMPLED:
                entry = sampled_entry(layout, stride_of(pattern, layout))
                trial[head] = restricted(entry, _tried(entry))
        if order is not SAMPLED:
            ordered = {head: replace(of, tile=order) for head, of in patterns.items()}
            whole = blocks_of(next(iter(ordered.values())), layout).whole
            found = blockwise_entries(q, k, ordered, layout, scale, _tried(whole))
            trial = {head: estimate.entry for head, estimate in found.items() if estimate.sound}
        if not trial:
            continue
        one = next(iter(trial.values()))
        nothing = restricted(one, torch.zeros(one.num_groups, dtype=torch.bool))
        index = index_of({head: trial.get(head, nothing) for head in range(heads)})
        got = sparse_attention(q, k, v, index if q.is_cpu else index.to(q.device), scale=scale)
        rows = _rows(one).to(q.device)
        want = out[:, :, rows].float()
        error = (got[:, :, rows].float() - want).square().sum((0, 2, 3))
        share = (error / want.square().sum((0, 2, 3)).clamp_min(1e-30)).tolist()
        for head in trial:
            if math.isfinite(share[head]) and share[head] < best.get(head, (None, math.inf))[1]:
                best[head] = (order, share[head])
    return best


def stride_of(pattern: Pattern, layout: TokenLayout) -> int:
    """The stride n at which a head that sees every n-th key costs what its blocks cost."""
    length, budget = layout.num_grid, pattern.shape.keep
    assert isinstance(budget, Budget), "own_order goes with a budget"
    keys = min(length, budget.keys(length))
    if pattern.far:
        keys += (length - keys) / length * blocks_of(pattern, layout).num_blocks
    return max(1, math.ceil(length / max(1.0, keys) - 0.01))


def _tried(entry: PatternIndex) -> Tensor:
    """Bool `[G]`: the groups that are tried, spread evenly."""
    groups = entry.num_groups
    step = max(1, groups // GROUPS)
    return torch.arange(groups) % step == step // 2


def _rows(entry: PatternIndex) -> Tensor:
    """Tokens of the groups that see something."""
    sees = entry.group_keys + entry.group_cells > 0
    return entry.query_tokens[torch.repeat_interleave(sees, entry.q_offsets.diff())]
