"""Which blocks a head sees, and its entry: bidirectional attention over the grid of a layout.

Letters in shapes: B batch, H heads, L listed heads, N tokens, D channels, C blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..entry import PatternIndex
from ..index import dense_entry
from ..layout import TokenLayout
from ..on_cpu import on_cpu
from ..patterns import Antidiagonal, Mass, Pattern, Pooled, Share
from ..patterns.blockwise import Above
from .blocks import Blocks, Chosen, Seen, blocks_of, entries_of
from .budget import fewest, within
from .scores import MOST_LOGITS, antidiagonal_scores, pooled_logits, pooled_probabilities

GOOD_RECALL = 0.8  # AdaSpa's: of heads that can do with fewer blocks


class Estimate(NamedTuple):
    """What was found for one head.

    Args:
        seen: Blocks, or an entry on the CPU; dense if it isn't sound.
        sound: Whether all that it was found from is finite.
        recall: The share of the probability in what is seen exactly.
    """

    seen: Seen
    sound: bool
    recall: float

    @property
    def entry(self) -> PatternIndex:
        """What is seen, laid out; of several heads `entries_of` does it at once."""
        return entries_of({0: self.seen})[0]


@on_cpu
@torch.no_grad()
def blockwise_entries(
    q: Tensor,
    k: Tensor,
    patterns: Mapping[int, Pattern],
    layout: TokenLayout,
    scale: float,
    active: int = 0,
    valid: tuple[int, int] | None = None,
) -> dict[int, Estimate]:
    """What each listed head sees, by its own queries and keys.

    All batch items share a head's blocks: those with the most probability on average.

    Args:
        q: `[B, H, N, D]`, any strides; of pooled shapes these may be the last tokens alone.
        k: `[B, num_kv_heads, M, D]`, any strides; H must be a multiple of `num_kv_heads`.
        patterns: By head: of shapes that are pooled or antidiagonal.
        layout: Where the M tokens lie.
        scale: Factor of the logits.
        active: So many last tokens are being denoised, of a diffusion language model.
        valid: The first key that some row may see, and the last + 1; None for all.
    """
    found: dict[int, Estimate] = {}
    for pattern in dict.fromkeys(patterns.values()):
        heads = [head for head, of in patterns.items() if of == pattern]
        blocks = blocks_of(pattern, layout)
        step = max(1, MOST_LOGITS // (blocks.num_blocks**2 * q.shape[0]))
        for start in range(0, len(heads), step):
            part = heads[start : start + step]
            scores, keep = _scored(q, k, part, pattern.shape, blocks, scale)
            if valid is not None:
                hidden = (blocks.bounds[1:] <= valid[0]) | (blocks.bounds[:-1] >= valid[1])
                scores = scores.masked_fill(hidden, 0)
            estimates = estimates_of(scores, keep, pattern.shape, blocks, active)
            found |= zip(part, estimates, strict=True)
    return found


def _scored(
    q: Tensor,
    k: Tensor,
    heads: Sequence[int],
    shape: Pooled | Antidiagonal,
    blocks: Blocks,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """Probabilities `[L, C, C]`, and bool, the same shape: what is chosen already; None if nothing is."""
    if isinstance(shape, Antidiagonal):
        order, first = blocks.order.order, blocks.order.global_before
        inside = order[first : int(blocks.bounds[-1])].to(q.device)
        group, bounds = q.shape[1] // k.shape[1], blocks.cells - blocks.cells[0]
        scores = [
            torch.stack(
                [
                    antidiagonal_scores(
                        q[b, h, inside], k[b, h // group, inside], bounds, shape.stride, scale
                    )
                    for b in range(len(q))
                ]
            ).mean(0)
            for h in heads
        ]
        return torch.stack(scores).cpu(), None
    logits, owner = pooled_logits(q, k, heads, blocks, scale, shape.parts)
    keep = None
    if isinstance(shape.keep, Above):
        row = logits.mean(0)
        level = row.mean(-1, keepdim=True) + shape.keep.sigmas * row.std(
            -1, keepdim=True, correction=0
        )
        keep = (row > level).cpu()
    return pooled_probabilities(logits, owner, blocks).mean(0).cpu(), keep


def estimates_of(
    p: Tensor,
    keep: Tensor | None,
    shape: Pooled | Antidiagonal | Mass,
    blocks: Blocks,
    active: int = 0,
) -> list[Estimate]:
    """What each head sees, by the probability that its blocks have.

    Args:
        p: `[L, C, C]`: of each pair of blocks, or of the last blocks of queries with all.
        keep: Bool, the same shape: which blocks are chosen; None if that is still to do.
        shape: How much is chosen.
        blocks: Where blocks lie.
        active: As for `blockwise_entries`.
    """
    sound = p.isfinite().flatten(1).all(1)
    if keep is None:
        keep = chosen_blocks(torch.where(sound[:, None, None], p, 0), shape, blocks)
    open_canvas = active if getattr(shape, "canvas", False) else 0
    near = blocks.near(shape.local, open_canvas, alone=p.shape[1] < blocks.num_blocks)
    keep = keep | near[-p.shape[1] :]
    recall = torch.where(keep, p, 0).sum((1, 2)) / p.sum((1, 2)).clamp_min(1e-12)
    keep = torch.nn.functional.pad(keep, (0, 0, blocks.num_blocks - p.shape[1], 0))
    dense = dense_entry(blocks.num_tokens, blocks.num_tokens)
    return [
        Estimate(Chosen.of(blocks, chosen) if ok else dense, ok, share)
        for chosen, ok, share in zip(keep, sound.tolist(), recall.tolist(), strict=True)
    ]


def chosen_blocks(
    p: Tensor, shape: Pooled | Antidiagonal | Mass, blocks: Blocks, rows: Tensor | None = None
) -> Tensor:
    """The blocks that a budget pays for, or that have a share of the probability: bool, as `p`.

    Args:
        p: `[L, C, C]`: of each pair of blocks.
        shape: How much is chosen.
        blocks: Where blocks lie.
        rows: int64 `[r]`: the blocks of queries that p is of, `[L, r, C]`; None for all.
    """
    if not getattr(shape, "isolated", False):
        return _chosen(p, shape, blocks.sizes, rows)
    chosen = torch.zeros_like(p, dtype=torch.bool)
    for segment in blocks.segments.unique():
        mine = blocks.segments == segment
        chosen[..., mine] = _chosen(p[..., mine], shape, blocks.sizes[mine], rows)
    return chosen


def _chosen(
    p: Tensor, shape: Pooled | Antidiagonal | Mass, sizes: Tensor, rows: Tensor | None
) -> Tensor:
    """`chosen_blocks` among blocks of keys of these sizes, `[K]`: bool `[L, C, K]`."""
    budget = shape.keep
    assert not isinstance(budget, Above), "it is of logits"
    keys = budget.keys(int(sizes.sum()))
    if isinstance(shape, Mass) and shape.adaptive:
        chosen = best_blocks(p, keys, sizes)
        recall = torch.where(chosen, p, 0).sum((1, 2)) / p.sum((1, 2)).clamp_min(1e-12)
        for more, heads in adapted(recall):
            if len(heads):
                chosen[heads] = best_blocks(p[heads], keys * more, sizes)
        return chosen
    chosen = best_blocks(p, keys, sizes, rows)
    if isinstance(budget, Share):
        chosen |= fewest(p / sizes, p, budget.gamma)
    return chosen


def best_blocks(p: Tensor, keys: float, sizes: Tensor, rows: Tensor | None = None) -> Tensor:
    """The blocks of most probability a key, for about so many keys a row: bool `[L, C, K]`.

    Where that is no whole number of blocks, rows take turns, so that the mean is met.

    Args:
        p: `[L, C, K]`.
        keys: How many.
        sizes: int64 `[K]`: keys in each block.
        rows: int64 `[C]`: which blocks of queries p is of; None for the first C.
    """
    heads, c, count = p.shape
    if keys >= int(sizes.sum()):
        return torch.ones_like(p, dtype=torch.bool)
    scores = (p / sizes).flatten(0, 1)
    size = int(sizes.max())
    place = torch.arange(c) if rows is None else rows
    turn = rows_with_more(place, keys, size).repeat(heads)
    chosen = torch.zeros(heads * c, count, dtype=torch.bool)
    none = torch.zeros(count, dtype=torch.bool)
    for which, more in ((turn, size), (~turn, 0)):
        if which.any():
            chosen[which] = within(scores[which], sizes, none, int(keys // size) * size + more)
    return chosen.view(heads, c, count)


def rows_with_more(place: Tensor, keys: float, size: int) -> Tensor:
    """Which rows see a block of `size` keys more, bool, so that the mean over all rows is `keys`.

    Args:
        place: The number of each row.
        keys: What the rows see in the mean.
        size: Keys of a block.
    """
    return (place.double() * 0.6180339887) % 1 * size + keys % size >= size


def adapted(recall: Tensor) -> list[tuple[float, list[int]]]:
    """Heads that see half as many keys, and half as many more: as many of each, by their recall.

    Args:
        recall: `[L]`: the share of the probability in the blocks that each would see.
    """
    count = min(int((recall > GOOD_RECALL).sum()), len(recall) // 2)
    order = recall.argsort(descending=True).tolist()
    return [(0.5, order[:count]), (1.5, order[len(order) - count :])]
