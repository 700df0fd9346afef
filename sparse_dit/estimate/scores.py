"""How much probability a block of keys is thought to have for a block of queries.

Letters in shapes: B batch, H heads, L listed heads, N tokens, D channels, C blocks, F parts of blocks,
P groups of query rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

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
    bounds, owner = cut_blocks(blocks, parts if q.shape[2] == k.shape[2] else 1)
    group = q.shape[1] // k.shape[1]
    listed = torch.tensor(heads).to(q.device)
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


def cut_blocks(blocks: Blocks, parts: int) -> tuple[Tensor, Tensor]:
    """Where parts of blocks begin, and the last ends, int32 `[F + 1]`; the block of each, int64 `[F]`.

    Args:
        blocks: Where blocks lie.
        parts: Each is cut into at most so many.
    """
    if parts == 1:
        return blocks.bounds, torch.arange(blocks.num_blocks)
    whole = blocks.bounds.long()
    bounds = cut_offsets(whole, -(-int(blocks.sizes.max()) // parts))
    return bounds.int(), torch.searchsorted(whole, bounds[:-1], right=True) - 1


def pooled_probabilities(logits: Tensor, owner: Tensor, blocks: Blocks) -> Tensor:
    """The softmax of pooled logits, by blocks: `[B, L, C, C]`, whose rows sum to 1.

    Args:
        logits, owner: As `pooled_logits` gives them; they are written to.
        blocks: Where blocks lie.
    """
    return probabilities(logits, parted(blocks, owner, logits.device))


class Parted(NamedTuple):
    """The block of each part of blocks, int64 `[F]`, and of each block its tokens and parts, `[C]`."""

    owner: Tensor
    sizes: Tensor
    parts: Tensor


def parted(blocks: Blocks, owner: Tensor, device: torch.device) -> Parted:
    """The tables of parts that are in the blocks `owner`, int64 `[F]` on the CPU."""
    count = torch.bincount(owner, minlength=blocks.num_blocks)
    return Parted(*(x.to(device) for x in (owner, blocks.sizes.float(), count)))


def probabilities(logits: Tensor, parts: Parted) -> Tensor:
    """As `pooled_probabilities`; no wait for the device."""
    c = len(parts.sizes)
    if len(parts.owner) == c:
        return logits.add_(parts.sizes.to(logits.dtype).log()).softmax(-1)
    p = logits.softmax(-1)  # parts of a block are about equal
    keys = p.new_zeros(*p.shape[:-1], c).index_add_(-1, parts.owner, p)
    rows = p.new_zeros(*p.shape[:2], c, c).index_add_(2, parts.owner, keys)
    return rows.div_(parts.parts[:, None])


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
    return antidiagonal_sums(
        q, k, squares_of(bounds, stride, q.device), stride, scale, causal=causal
    )


class Squares(NamedTuple):
    """The blocks that each square lies in, int64 `[squares, 1 or stride]`; tokens of each block, `[C, 1]`."""

    owner: Tensor
    tokens: Tensor


def squares_of(bounds: Tensor, stride: int, device: torch.device) -> Squares:
    """The tables of squares of so many tokens, and of blocks that begin at `bounds`, int64 `[C + 1]`."""
    tokens = int(bounds[-1])
    squares = torch.arange(-(-tokens // stride))
    places = (squares[:, None] * stride + torch.arange(stride)).clamp_max(tokens - 1)
    owner = torch.searchsorted(bounds.cpu(), places, right=True) - 1  # [squares, stride]
    if (owner == owner[:, :1]).all():
        owner = owner[:, :1]
    count = torch.bincount(owner.flatten(), minlength=len(bounds) - 1)[:, None]
    return Squares(owner.to(device), count.to(device))


def antidiagonal_sums(
    q: Tensor,
    k: Tensor,
    squares: Squares,
    stride: int,
    scale: float,
    *,
    causal: bool = False,
    most: int = MOST_LOGITS,
) -> Tensor:
    """As `antidiagonal_scores`, of `[..., N, D]`; no wait for the device.

    Args:
        q, k, stride, scale, causal: As there; the leading dimensions of both are the same.
        squares: Where squares lie.
        most: Logits that are made at once.
    """
    owner, tokens = squares
    pad = -q.shape[-2] % stride
    q, k = (torch.nn.functional.pad(x.float(), (0, 0, 0, pad)) for x in (q, k))
    q = q.unflatten(-2, (-1, stride)).flip(-2).flatten(-2)
    k = k.unflatten(-2, (-1, stride)).flatten(-2)
    lead, number = q.shape[:-2], q.shape[-2]
    c, share = len(tokens), 1 / owner.shape[1]
    places = torch.arange(number, device=q.device)
    found, step = q.new_zeros(*lead, c, c), max(1, most // (number * math.prod(lead)))
    for start in range(0, number, step):
        rows = slice(start, start + step)
        logits = q[..., rows, :] @ k.transpose(-1, -2) * (scale / stride)
        if causal:
            logits = logits.masked_fill_(places > places[rows, None], -torch.inf)
        p = logits.softmax(-1).mul_(share)
        keys = p.new_zeros(*p.shape[:-1], c)
        for of in owner.T:
            keys.index_add_(-1, of, p)
        for of in owner[rows].T:
            found.index_add_(-2, of, keys)
    return found / tokens


def mass_by_block(mass: Tensor, blocks: Blocks, mass_block: int) -> Tensor:
    """Mean probability of each pair of blocks, float32 `[B, L, C, C]`, from what a dense pass counted.

    Args:
        mass: float32 `[B, L, P, S]`: sums by the groups of `Blocks.whole` and by stretches of keys.
        blocks: Where blocks lie.
        mass_block: Sorted keys in a stretch. Exact if it divides the blocks' bounds; else a stretch's
            probability is taken as even.
    """
    return mass_sums(mass, stretches_of(blocks, mass_block, mass.device)).cpu()


class Stretches(NamedTuple):
    """Where blocks lie among stretches of keys, and which groups are theirs; `C` blocks.

    Args:
        groups, owner: int64: the groups of blocks, and the block of each.
        whole: int64 `[C + 1]`: whole stretches before each bound.
        inside: float32 `[C + 1]`: the share of the next stretch that is before it.
        sizes: int64 `[C]`: tokens of each block.
    """

    groups: Tensor
    owner: Tensor
    whole: Tensor
    inside: Tensor
    sizes: Tensor


def stretches_of(blocks: Blocks, mass_block: int, device: torch.device) -> Stretches:
    """The tables of blocks and stretches of so many keys."""
    mine = (blocks.groups.owner >= 0).nonzero()[:, 0]
    bounds, ends = blocks.bounds.long(), -(-blocks.num_tokens // mass_block) - 1
    whole = (bounds // mass_block).clamp_max(ends)
    length = (blocks.num_tokens - whole * mass_block).clamp_max(mass_block)  # the last one's
    inside = (bounds - whole * mass_block) / length
    tables = (mine, blocks.groups.owner[mine], whole, inside, blocks.sizes)
    return Stretches(*(x.to(device) for x in tables))


def mass_sums(mass: Tensor, stretches: Stretches) -> Tensor:
    """As `mass_by_block`; no wait for the device."""
    groups, owner, whole, inside, sizes = stretches
    rows = mass.new_zeros(*mass.shape[:2], len(sizes), mass.shape[-1])
    rows = rows.index_add_(2, owner, mass.index_select(2, groups)).double()
    total = torch.nn.functional.pad(rows.cumsum(-1), (1, 0))
    upto = total[..., whole] + rows[..., whole] * inside
    return (upto.diff(dim=-1) / sizes[:, None]).float()


def mass_stretch(blocks: Blocks) -> int:
    """Sorted keys in a stretch of `mass_by_block`: the most that bounds allow, but at least 8."""
    return max(8, math.gcd(*blocks.bounds.tolist(), 64))
