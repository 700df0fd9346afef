"""How much probability a block of keys is thought to have for a block of queries.

Letters in shapes: B batch, H heads, L listed heads, N tokens, D channels, C blocks, F parts of blocks,
P groups of query rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.cpu import estimates, library
from ..layout import cut_offsets
from .blocks import Blocks

MOST_LOGITS = 1 << 22  # of heads that are estimated at once


def pooled_logits(
    q: Tensor,
    k: Tensor,
    heads: Sequence[int],
    blocks: Blocks,
    scale: float,
    parts: int = 1,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits of mean queries and mean keys, float32 `[B, L, F, F]`, and the block of each part, int64 `[F]`.

    Where queries are the last tokens alone, these are the logits of their blocks, `[B, L, last, C]`.

    Args:
        q: `[B, H, N, D]`, any strides.
        k: `[B, num_kv_heads, M, D]`, any strides.
        heads: Which heads.
        blocks: Where blocks lie.
        scale: Factor of the logits.
        parts: Each block is cut into at most so many parts; not so where queries are the last tokens alone.
        rows: int64 `[r]`: the blocks of queries that are wanted, `[B, L, r, F]`; None for all, as with parts.
    """
    bounds, owner = blocks.bounds, torch.arange(blocks.num_blocks)
    if parts > 1 and q.shape[2] == k.shape[2]:
        size = -(-int(blocks.sizes.max()) // parts)
        bounds = cut_offsets(bounds.long(), size).int()
        owner = torch.searchsorted(blocks.bounds.long(), bounds[:-1].long(), right=True) - 1
    group = q.shape[1] // k.shape[1]
    listed = torch.tensor(heads, device=q.device)
    if rows is not None and parts == 1:
        mean_q = means_of(q, blocks, rows)[:, listed]
    elif q.shape[2] == k.shape[2]:
        mean_q = block_means(q, blocks, bounds)[:, listed]
    else:
        before = k.shape[2] - q.shape[2]
        starts = bounds[blocks.first_of(q.shape[2]) :] - before
        mean_q = means_by_torch(q, torch.arange(q.shape[2]), starts)[:, listed]
    mean_k = block_means(k, blocks, bounds)[:, listed // group]
    return (mean_q @ mean_k.transpose(2, 3)).mul_(scale), owner


def pooled_probabilities(logits: Tensor, owner: Tensor, blocks: Blocks) -> Tensor:
    """The softmax of pooled logits, by blocks: `[B, L, C, C]`, whose rows sum to 1.

    Args:
        logits, owner: As `pooled_logits` gives them; they are written to.
        blocks: Where blocks lie.
    """
    owner = owner.to(logits.device)
    if len(owner) == blocks.num_blocks:
        return logits.add_(blocks.sizes.to(logits).log()).softmax(-1)
    count = torch.bincount(owner)
    p = logits.softmax(-1)  # parts of a block are about equal
    c = blocks.num_blocks
    keys = p.new_zeros(*p.shape[:-1], c).index_add_(-1, owner, p)
    rows = p.new_zeros(*p.shape[:2], c, c).index_add_(2, owner, keys)
    return rows.div_(count[:, None])


def block_means(x: Tensor, blocks: Blocks, bounds: Tensor) -> Tensor:
    """Means of stretches of sorted tokens, float32 `[B, H, F, D]`.

    Args:
        x: `[B, H, N, D]`, any strides.
        blocks: The order of the tokens.
        bounds: int32 `[F + 1]`: sorted positions.
    """
    if library.LIBRARY is not None and x.is_cpu and estimates.means_takes(x):
        return estimates.means(x, blocks.permutation, bounds)
    return means_by_torch(x, blocks.order.order, bounds)


def means_of(x: Tensor, blocks: Blocks, rows: Tensor) -> Tensor:
    """Means of some blocks, int64 `[r]`: float32 `[B, H, r, D]`."""
    order, bounds = blocks.order.order, blocks.bounds.tolist()
    tokens = [order[bounds[row] : bounds[row + 1]].to(x.device) for row in rows.tolist()]
    return torch.stack([x[:, :, of].float().mean(2) for of in tokens], 2)


def means_by_torch(x: Tensor, order: Tensor, bounds: Tensor) -> Tensor:
    """`block_means` by PyTorch, where the kernel's library doesn't take the tensor."""
    bounds = bounds.long()
    sizes = bounds.diff().to(x.device)
    owner = torch.repeat_interleave(torch.arange(len(sizes), device=x.device), sizes)
    tokens = order[int(bounds[0]) : int(bounds[-1])].to(x.device)
    wide = torch.promote_types(x.dtype, torch.float32)
    none = torch.zeros(*x.shape[:2], len(sizes), x.shape[3], dtype=wide, device=x.device)
    total = none.index_add_(2, owner, x[:, :, tokens].to(wide))
    return (total / sizes[:, None]).float()


def antidiagonal_scores(
    q: Tensor,
    k: Tensor,
    bounds: Tensor,
    stride: int,
    scale: float,
    *,
    causal: bool = False,
) -> Tensor:
    """XAttention's estimate of the probability of each pair of blocks, float32 `[C, C]`; rows sum to 1.

    Of every square of `stride` queries and keys the logits of one antidiagonal are summed; their softmax over
    the squares of a row, summed over a block, is the score. A square that lies in several blocks is shared
    out by its tokens.

    Args:
        q, k: `[N, D]`, sorted.
        bounds: int64 `[C + 1]`: where blocks begin, from 0 to N.
        stride: Side of a square; sizes that it doesn't divide are filled up with zeros.
        scale: Factor of the logits.
        causal: Whether squares of later keys are left out.
    """
    pad = -len(q) % stride
    q, k = (torch.nn.functional.pad(x.float(), (0, 0, 0, pad)) for x in (q, k))
    q, k = q.unflatten(0, (-1, stride)).flip(1).flatten(1), k.unflatten(0, (-1, stride)).flatten(1)
    squares, tokens = torch.arange(len(q), device=q.device), int(bounds[-1])
    places = (squares[:, None] * stride + torch.arange(stride, device=q.device)).clamp_max(
        tokens - 1
    )
    owner = torch.searchsorted(bounds.to(q.device), places, right=True) - 1  # [squares, stride]
    if (owner == owner[:, :1]).all():
        owner = owner[:, :1]
    c, share = len(bounds) - 1, 1 / owner.shape[1]
    found, step = q.new_zeros(c, c), max(1, MOST_LOGITS // len(k))
    for start in range(0, len(q), step):
        rows = slice(start, start + step)
        logits = q[rows] @ k.T * (scale / stride)
        if causal:
            logits = logits.masked_fill_(squares > squares[rows, None], -torch.inf)
        p = logits.softmax(-1).mul_(share)
        keys = p.new_zeros(len(p), c)
        for of in owner.T:
            keys.index_add_(1, of, p)
        for of in owner[rows].T:
            found.index_add_(0, of, keys)
    return found / torch.bincount(owner.flatten(), minlength=c)[:, None]


def mass_by_block(mass: Tensor, blocks: Blocks, mass_block: int) -> Tensor:
    """Mean probability of each pair of blocks, float32 `[B, L, C, C]`, from what a dense pass counted.

    Args:
        mass: float32 `[B, L, P, S]`: sums by the groups of `Blocks.whole` and by stretches of keys.
        blocks: Where blocks lie.
        mass_block: Sorted keys in a stretch. Exact if it divides the blocks' bounds; else a stretch's
            probability is taken as even.
    """
    mass = mass[:, :, : len(blocks.groups.owner)].cpu()
    mine = blocks.groups.owner >= 0
    rows = mass.new_zeros(*mass.shape[:2], blocks.num_blocks, mass.shape[-1])
    rows.index_add_(2, blocks.groups.owner[mine], mass[:, :, mine])
    total = torch.nn.functional.pad(rows.double().cumsum(-1), (1, 0))
    bounds, ends = blocks.bounds.long(), mass.shape[-1] - 1
    whole = (bounds // mass_block).clamp_max(ends)
    inside = bounds - whole * mass_block
    length = (blocks.num_tokens - whole * mass_block).clamp_max(mass_block)  # the last one's
    part = rows.double()[..., whole] * (inside / length)
    upto = total[..., whole] + part
    return (upto.diff(dim=-1) / blocks.sizes[:, None]).float()


def mass_stretch(blocks: Blocks) -> int:
    """Sorted keys in a stretch of `mass_by_block`: the most that bounds allow, but at least 8."""
    return max(8, math.gcd(*blocks.bounds.tolist(), 64))
