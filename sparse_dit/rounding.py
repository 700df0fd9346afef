"""Key runs rounded up to uniform blocks, for kernels that compute whole tiles (Triton, FlexAttention); and
back: lists of blocks, partial ones with their masks, as key runs.

A block is full if all of its rows see all of its keys: no mask is needed. It is partial if some do: then
its exact mask comes along as bits. So the result computes what the index says, no more and no less, while
the work done is that of all listed blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from .index import MAX_GROUP, PatternIndex, runs_of
from .on_cpu import on_cpu


@dataclass(frozen=True, eq=False)
class BlockIndex:
    """One pattern in blocks of `block_q` sorted query rows and `block_k` sorted keys.

    Qb = ceil(N / block_q), Kb = ceil(M / block_k). CSR lists; key blocks ascend in each row.

    Args:
        block_q, block_k: Block sizes.
        full_offsets, full: int32 `[Qb + 1]`, `[n_full]`: key blocks seen wholly.
        partial_offsets, partial: int32 `[Qb + 1]`, `[n_partial]`: key blocks seen in part.
        bits: int32 `[n_partial, block_q, ceil(block_k / 32)]`: bit j of word w is key `32 * w + j`.
            Rows and keys beyond the ends are 0.
        density: Pairs in the listed blocks (cut at the ends) over all pairs: what a kernel computes.
    """

    block_q: int
    block_k: int
    full_offsets: Tensor
    full: Tensor
    partial_offsets: Tensor
    partial: Tensor
    bits: Tensor
    density: float


@on_cpu
def to_blocks(entry: PatternIndex, block_q: int, block_k: int) -> BlockIndex:
    """Round the exact part of `entry` to blocks; the far field keeps its own lists.

    Raises:
        ValueError: If a block size is not in 1 to 1024.
    """
    if not (1 <= block_q <= 1024 and 1 <= block_k <= 1024):
        raise ValueError(f"block sizes must be 1 to 1024, got {block_q} and {block_k}")
    entry = entry.to("cpu")
    n, m = entry.num_queries, entry.num_keys
    rows, columns = -(-n // block_q), -(-m // block_k)
    bounds = (torch.arange(columns + 1) * block_k).clamp_max(m)
    seen = _keys_below(entry, bounds).diff(dim=1)  # [G, Kb] keys of each block that a group sees
    group, row = overlaps(entry, block_q, n)
    hit = torch.zeros(rows, columns, dtype=torch.int32)
    whole = torch.zeros(rows, columns, dtype=torch.int32)
    hit.index_add_(0, row, (seen[group] > 0).int())
    whole.index_add_(0, row, (seen[group] == bounds.diff()).int())
    count = torch.bincount(row, minlength=rows)[:, None]
    every, some = whole == count, (hit > 0) & (whole < count)
    sizes = (torch.arange(rows + 1) * block_q).clamp_max(n).diff()[:, None] * bounds.diff()
    listed = (sizes * (every | some)).sum().item()
    full_offsets, full = _csr(every)
    partial_offsets, partial = _csr(some)
    bits = _bits(entry, some, block_q, block_k)
    return BlockIndex(
        block_q, block_k, full_offsets, full, partial_offsets, partial, bits, listed / (n * m)
    )


@on_cpu
def from_blocks(
    blocks: BlockIndex,
    num_queries: int,
    num_keys: int,
    *,
    q_order: Tensor | None = None,
    k_order: Tensor | None = None,
) -> PatternIndex:
    """The inverse of `to_blocks`: lists of blocks from anywhere, for kernels that read key runs.

    Neighbouring rows that see the same keys become one group, so that masks inside partial blocks are kept
    to the token. A block whose rows all differ becomes groups of one row each: right, but slow.

    Args:
        blocks: Full and partial blocks of sorted positions; `density` isn't read.
        num_queries, num_keys: N and M.
        q_order, k_order: int32 `[N]`, `[M]`: the token at each sorted position; None if tokens stay in
            place.

    Raises:
        ValueError: If the lists don't fit N and M.
    """
    _check(blocks, num_queries, num_keys)
    offsets, counts, runs = [torch.zeros(1, dtype=torch.int64)], [], []
    for row in range(-(-num_queries // blocks.block_q)):
        start = row * blocks.block_q
        seen, sizes = torch.unique_consecutive(
            _mask_of_row(blocks, row, min(num_queries - start, blocks.block_q), num_keys),
            return_counts=True,
            dim=0,
        )
        parts = (sizes + MAX_GROUP - 1) // MAX_GROUP
        seen = seen.repeat_interleave(parts, 0)
        first = torch.cat([torch.arange(0, int(n), MAX_GROUP) for n in sizes])
        begin = start + first + (sizes.cumsum(0) - sizes).repeat_interleave(parts)
        offsets.append(torch.cat([begin[1:], torch.tensor([start + int(sizes.sum())])]))
        owner, low, high = runs_of(seen)
        counts.append(torch.bincount(owner, minlength=len(seen)))
        runs.append(torch.stack([low, high - low], 1))
    run_offsets = torch.nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0))
    return PatternIndex(
        num_queries,
        num_keys,
        q_order,
        k_order,
        torch.cat(offsets).int(),
        run_offsets.int(),
        torch.cat(runs).int(),
    )


def _mask_of_row(blocks: BlockIndex, row: int, queries: int, num_keys: int) -> Tensor:
    """What the queries of one row of blocks see, bool `[queries, num_keys]`."""
    size = blocks.block_k
    mask = torch.zeros(queries, -(-num_keys // size), size, dtype=torch.bool)
    mask[:, blocks.full[blocks.full_offsets[row] : blocks.full_offsets[row + 1]].long()] = True
    listed = slice(int(blocks.partial_offsets[row]), int(blocks.partial_offsets[row + 1]))
    bits = blocks.bits[listed, :queries, :, None] >> torch.arange(32) & 1
    seen = rearrange(bits.bool(), "block query word bit -> query block (word bit)")
    mask[:, blocks.partial[listed].long()] = seen[..., :size]
    return mask.flatten(1)[:, :num_keys]


def _check(blocks: BlockIndex, num_queries: int, num_keys: int) -> None:
    """Raise ValueError unless the lists fit N and M."""
    if min(num_queries, num_keys, blocks.block_q, blocks.block_k) < 1:
        raise ValueError("sizes of blocks, queries and keys must be at least 1")
    rows, columns = -(-num_queries // blocks.block_q), -(-num_keys // blocks.block_k)
    for name in ("full", "partial"):
        offsets, listed = getattr(blocks, f"{name}_offsets").long(), getattr(blocks, name).long()
        fits = len(offsets) == rows + 1 and offsets[0] == 0 and offsets[-1] == len(listed)
        if not fits or (offsets.diff() < 0).any():
            raise ValueError(
                f"{name}_offsets must rise from 0 to the {len(listed)} listed blocks in {rows + 1} "
                f"steps, for {num_queries} queries in blocks of {blocks.block_q}"
            )
        if len(listed) and not 0 <= int(listed.min()) <= int(listed.max()) < columns:
            raise ValueError(f"{name} must hold blocks 0 to {columns - 1}, got {listed.unique()}")
    shape = (len(blocks.partial), blocks.block_q, -(-blocks.block_k // 32))
    if tuple(blocks.bits.shape) != shape:
        raise ValueError(f"bits must have shape {shape}, got {tuple(blocks.bits.shape)}")


def _csr(mask: Tensor) -> tuple[Tensor, Tensor]:
    offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    return offsets.int(), mask.nonzero()[:, 1].int()


def overlaps(entry: PatternIndex, block_q: int, n: int) -> tuple[Tensor, Tensor]:
    """Pairs of a group and a block of rows that share rows."""
    first = entry.q_offsets[:-1].long() // block_q
    last = (entry.q_offsets[1:].long() - 1) // block_q
    count = last - first + 1
    group = torch.repeat_interleave(torch.arange(len(first)), count)
    rank = torch.arange(len(group)) - torch.repeat_interleave(count.cumsum(0) - count, count)
    return group, first[group] + rank


def _keys_below(entry: PatternIndex, bounds: Tensor) -> Tensor:
    """How many of each group's keys lie below each bound, int64 `[G, len(bounds)]`."""
    start, length = entry.runs[:, 0].long(), entry.runs[:, 1].long()
    offsets = entry.run_offsets.long()
    owner = torch.repeat_interleave(torch.arange(entry.num_groups), offsets.diff())
    stride = entry.num_keys + 1
    total = torch.nn.functional.pad(length.cumsum(0), (1, 0))
    wanted = torch.arange(entry.num_groups)[:, None] * stride + bounds
    place = torch.searchsorted(owner * stride + start, wanted)  # runs that start below the bound
    begin = offsets[:-1, None]
    previous = (place - 1).clamp_min(0)
    if len(start):
        overhang = (start[previous] + length[previous] - bounds).clamp_min(0)
    else:
        overhang = torch.zeros_like(place)
    overhang = torch.where(place > begin, overhang, 0)
    return total[place] - total[begin] - overhang


def _bits(entry: PatternIndex, some: Tensor, block_q: int, block_k: int) -> Tensor:
    """Masks of the partial blocks, packed."""
    words = -(-block_k // 32)
    row, column = some.nonzero(as_tuple=True)
    bits = torch.zeros(len(row), block_q, words, dtype=torch.int32)
    row_group = torch.repeat_interleave(
        torch.arange(entry.num_groups), entry.q_offsets.diff().long()
    )
    row_group = torch.nn.functional.pad(row_group, (0, -len(row_group) % block_q), value=-1)
    step = max(1, (1 << 22) // (block_q * words * 32))
    for start in range(0, len(row), step):
        r, c = row[start : start + step], column[start : start + step]
        groups = row_group.view(-1, block_q)[r]  # [n, block_q]
        keys = c[:, None] * block_k + torch.arange(words * 32)  # [n, words * 32]
        inside = (torch.arange(words * 32) < block_k) & (keys < entry.num_keys)
        mask = _sees(entry, groups[:, :, None], keys[:, None]) & inside[:, None]
        weight = torch.ones(32, dtype=torch.int64) << torch.arange(32)
        packed = (mask.view(len(r), block_q, words, 32) * weight).sum(-1)
        bits[start : start + step] = packed.to(torch.int32)
    return bits


def _sees(entry: PatternIndex, group: Tensor, key: Tensor) -> Tensor:
    """Whether groups see sorted keys, bool of the broadcast shape; group -1 sees nothing."""
    group, key = torch.broadcast_tensors(group, key)
    start, length = entry.runs[:, 0].long(), entry.runs[:, 1].long()
    if not len(start):
        return torch.zeros(group.shape, dtype=torch.bool)
    offsets = entry.run_offsets.long()
    owner = torch.repeat_interleave(torch.arange(entry.num_groups), offsets.diff())
    stride = entry.num_keys + 1
    safe = group.clamp_min(0)
    place = torch.searchsorted(owner * stride + start, safe * stride + key, right=True) - 1
    run = place.clamp_min(0)
    return (group >= 0) & (place >= offsets[safe]) & (key < start[run] + length[run])
