"""Which blocks a head sees, found on the device of its queries and keys: the host waits for nothing.

It is what `blockwise.py` finds, for the Triton backend, which then lays them out there too. What depends on
where tokens lie alone is made once on the host and kept.
Letters in shapes: B batch, H heads, L listed heads, N tokens, D channels, C blocks, F parts of blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import TESTED_DEVICES, backend_name
from ..autocast import lowered, without_autocast
from ..backends import triton
from ..backends.triton.check import is_right
from ..backends.triton.chosen import ChosenBlocks
from ..call import AttentionCall
from ..index import dense_index
from ..layout import TokenLayout
from ..on_cpu import on_cpu
from ..patterns import Antidiagonal, Mass, Pattern, Pooled, Share
from ..patterns.blockwise import Above
from .blocks import Blocks, blocks_of
from .blockwise import GOOD_RECALL, rows_with_more
from .budget import fewest
from .scores import (
    Parted,
    Squares,
    antidiagonal_sums,
    cut_blocks,
    mass_sums,
    parted,
    probabilities,
    squares_of,
    stretches_of,
)

MOST = 1 << 25  # logits, or scores of pairs of blocks, of heads that are estimated at once

Shape = Pooled | Antidiagonal | Mass


def takes(call: AttentionCall, patterns: Sequence[Pattern], backend: str) -> bool:
    """Whether a call's blocks are found on its device: the Triton backend computes it, over a whole grid."""
    q, k = call.q, call.k
    if backend not in ("auto", "triton") or (q.is_cpu and not triton.interpreted()):
        return False
    if torch.compiler.is_compiling() or call.context.active or q.shape[1] != k.shape[1]:
        return False
    shapes = {pattern.shape for pattern in patterns if pattern.is_estimated}
    plain = all(type(shape) in (Pooled, Antidiagonal, Mass) for shape in shapes)
    of_text = any(getattr(s, "isolated", False) or getattr(s, "canvas", False) for s in shapes)
    if not plain or of_text or call.sinks is not None or call.bias is not None:
        return False
    like = lowered(q)[0].transpose(1, 2)
    index = dense_index(like.shape[1], like.shape[2], like.shape[2], like.device)
    mass = any(isinstance(shape, Mass) for shape in shapes)
    try:
        name = backend_name(like, index, backend, mass=mass, value_width=call.v.shape[-1])
    except NotImplementedError:
        return False  # who computes it says why
    if name != "triton":
        return False
    return q.device.type in TESTED_DEVICES or is_right(q.device, like.shape[-1], like.dtype)


def sees_all(pattern: Pattern, layout: TokenLayout) -> bool:
    """Whether a budget pays for all blocks, whatever queries and keys are."""
    keep, total = pattern.shape.keep, layout.num_grid
    return not isinstance(keep, Above) and keep.keys(total) >= total


class Found(NamedTuple):
    """What heads see, and whether all that it was found from is finite, bool `[]` on the device."""

    seen: dict[int, ChosenBlocks]
    sound: Tensor


@torch.no_grad()
def blocks_on_device(
    q: Tensor, k: Tensor, patterns: Mapping[int, Pattern], layout: TokenLayout, scale: float
) -> Found:
    """What each listed head sees, by its own queries and keys; arguments as of `blockwise_entries`.

    A head with NaN or Inf sees all.
    """
    seen: dict[int, ChosenBlocks] = {}
    sound = torch.ones((), dtype=torch.bool, device=q.device)
    with without_autocast(q.device.type):
        for pattern in dict.fromkeys(patterns.values()):
            blocks = blocks_of(pattern, layout)
            heads = [head for head, of in patterns.items() if of == pattern]
            step = max(1, MOST // (blocks.num_blocks**2 * q.shape[0]))
            for start in range(0, len(heads), step):
                part = heads[start : start + step]
                p, keep = _scored(q, k, tuple(part), pattern.shape, blocks, scale)
                found = _kept(p, keep, pattern.shape, blocks, part)
                seen |= found.seen
                sound &= found.sound
    return Found(seen, sound)


@torch.no_grad()
def blocks_of_mass(
    mass: Tensor, patterns: Mapping[int, Pattern], layout: TokenLayout, mass_block: int
) -> Found:
    """What heads see whose mass was counted, float32 `[B, H, P, S]`, in stretches of `mass_block` keys."""
    seen: dict[int, ChosenBlocks] = {}
    sound = torch.ones((), dtype=torch.bool, device=mass.device)
    for pattern in dict.fromkeys(patterns.values()):
        blocks = blocks_of(pattern, layout)
        heads = [head for head, of in patterns.items() if of == pattern]
        mine = mass.index_select(1, _listed(tuple(heads), mass.device))
        p = mass_sums(mine, _stretches(blocks, mass_block, mass.device)).mean(0)
        found = _kept(p, None, pattern.shape, blocks, heads)
        seen |= found.seen
        sound &= found.sound
    return Found(seen, sound)


def _scored(
    q: Tensor, k: Tensor, heads: tuple[int, ...], shape: Shape, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Probabilities `[L, C, C]`, and bool, the same shape: what is chosen already; None if nothing is."""
    device, group = q.device, q.shape[1] // k.shape[1]
    mine, of_keys = _listed(heads, device), _listed(tuple(h // group for h in heads), device)
    if isinstance(shape, Antidiagonal):
        squares, inside = _squares(blocks, shape.stride, device)
        found = []
        for b in range(len(q)):
            mine_q, mine_k = q[b, mine[:, None], inside], k[b, of_keys[:, None], inside]
            found.append(antidiagonal_sums(mine_q, mine_k, squares, shape.stride, scale, most=MOST))
        return torch.stack(found).mean(0), None
    assert isinstance(shape, Pooled), "mass is counted, not estimated"
    pooling = _pooling(blocks, shape.parts, device)
    logits = _means(q, mine, pooling) @ _means(k, of_keys, pooling).transpose(2, 3) * scale
    keep = None
    if isinstance(shape.keep, Above):
        row = logits.mean(0)
        level = row.std(-1, keepdim=True, correction=0) * shape.keep.sigmas
        keep = row > row.mean(-1, keepdim=True) + level
    return probabilities(logits, pooling.parts).mean(0), keep


def _kept(
    p: Tensor, keep: Tensor | None, shape: Shape, blocks: Blocks, heads: Sequence[int]
) -> Found:
    """What heads see by the probability that their blocks have, `[L, C, C]`; see `estimates_of`."""
    sound = p.isfinite().flatten(1).all(1)
    rules = _rules(blocks, shape, p.device)
    if keep is None:
        keep = _chosen(torch.where(sound[:, None, None], p, 0), shape, rules)
    keep = keep | rules.near | ~sound[:, None, None]
    spare = -blocks.num_blocks % 8
    eights = torch.nn.functional.pad(keep, (0, spare)).unflatten(-1, (-1, 8))
    bits = (eights * rules.powers).sum(-1, dtype=torch.uint8)
    return Found(
        {head: ChosenBlocks(blocks.places, bits[i]) for i, head in enumerate(heads)}, sound.all()
    )


def _chosen(p: Tensor, shape: Shape, rules: _Rules) -> Tensor:
    """The blocks that a budget pays for, or that have a share of the probability; see `chosen_blocks`."""
    scores = p / rules.sizes
    chosen = _best(scores, rules.sizes, rules.most[0])
    if isinstance(shape, Mass) and shape.adaptive:
        recall = torch.where(chosen, p, 0).sum((1, 2)) / p.sum((1, 2)).clamp_min(1e-12)
        count = (recall > GOOD_RECALL).sum().clamp_max(len(p) // 2)
        place = recall.argsort(descending=True).argsort()
        fewer, more = place < count, place >= len(p) - count
        rule = torch.where(fewer, 1, torch.where(more, 2, 0))
        return _best(scores, rules.sizes, rules.most[rule])
    if isinstance(shape.keep, Share):
        chosen |= fewest(scores, p, shape.keep.gamma)
    return chosen


def _best(scores: Tensor, sizes: Tensor, most: Tensor) -> Tensor:
    """The best blocks of keys within so many keys, int64 `[..., C]`, for each block of queries."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    taken = sizes[order].cumsum(-1) <= most[..., None]
    return torch.zeros_like(taken).scatter_(-1, order, taken)


class _Rules(NamedTuple):
    """What a shape over blocks says.

    Args:
        sizes: int64 `[C]`: tokens of each block.
        most: int64 `[3, C]`: keys that a budget pays each block of queries; half, and half as many more.
        near: Bool `[C, C]`: blocks that are seen anyway.
        powers: uint8 `[8]`: 1, 2, 4, ...
    """

    sizes: Tensor
    most: Tensor
    near: Tensor
    powers: Tensor


@functools.lru_cache(maxsize=256)
@on_cpu
def _rules(blocks: Blocks, shape: Shape, device: torch.device) -> _Rules:
    total = int(blocks.sizes.sum())
    most = []
    for factor in (1.0, 0.5, 1.5):
        keys = 0.0 if isinstance(shape.keep, Above) else shape.keep.keys(total) * factor
        most.append(_turns(keys, total, blocks))
    powers = 1 << torch.arange(8)
    tables = (blocks.sizes, torch.stack(most), blocks.near(shape.local), powers.to(torch.uint8))
    return _Rules(*(x.to(device) for x in tables))


def _turns(keys: float, total: int, blocks: Blocks) -> Tensor:
    """How many keys each block of queries may see, so that the mean is `keys`; see `best_blocks`."""
    count, size = blocks.num_blocks, int(blocks.sizes.max())
    if keys >= total:
        return torch.full((count,), total)
    return int(keys // size) * size + rows_with_more(torch.arange(count), keys, size) * size


class _Pooling(NamedTuple):
    """Equal stretches of sorted tokens, of parts of blocks.

    Args:
        tokens: int64 `[F * S]`; short parts are filled up with their first token.
        real: Bool `[F, S, 1]`: what isn't filled up; None if nothing is.
        sizes: float32 `[F, 1]`: tokens of each part.
        parts: The parts that the blocks lie in.
    """

    tokens: Tensor
    real: Tensor | None
    sizes: Tensor
    parts: Parted


@functools.lru_cache(maxsize=256)
@on_cpu
def _pooling(blocks: Blocks, parts: int, device: torch.device) -> _Pooling:
    bounds, owner = cut_blocks(blocks, parts)
    bounds = bounds.long()
    sizes = bounds.diff()
    place = torch.arange(int(sizes.max()))
    real = place < sizes[:, None]
    tokens = blocks.order.order[torch.where(real, bounds[:-1, None] + place, bounds[:-1, None])]
    shown = None if real.all() else real[:, :, None].to(device)
    of = parted(blocks, owner, device)
    return _Pooling(tokens.flatten().to(device), shown, sizes[:, None].float().to(device), of)


def _means(x: Tensor, heads: Tensor, pooling: _Pooling) -> Tensor:
    """Mean tokens of parts of listed heads, int64 `[L]`: float32 `[B, L, F, D]`."""
    picked = x[:, heads[:, None], pooling.tokens].unflatten(2, (len(pooling.sizes), -1))
    if pooling.real is not None:
        picked *= pooling.real
    return picked.sum(3, dtype=torch.float32) / pooling.sizes


@functools.lru_cache(maxsize=256)
@on_cpu
def _squares(blocks: Blocks, stride: int, device: torch.device) -> tuple[Squares, Tensor]:
    """Where squares lie, and the tokens of the grid in order."""
    inside = blocks.order.order[int(blocks.bounds[0]) : int(blocks.bounds[-1])]
    return squares_of(blocks.cells - blocks.cells[0], stride, device), inside.to(device)


_stretches = functools.lru_cache(maxsize=256)(on_cpu(stretches_of))


@functools.lru_cache(maxsize=1024)
@on_cpu
def _listed(heads: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(heads).to(device)
