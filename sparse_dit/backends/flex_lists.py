"""An index as FlexAttention reads it: full and partial blocks by head, and the masks of partial ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..index import PatternIndex, SparseIndex
from ..on_cpu import on_cpu
from ..rounding import BlockIndex, to_blocks
from .sorting import max_cells


@dataclass(frozen=True, eq=False)
class FlexLists:
    """Blocks of `block` sorted rows and keys; keys are those of the index and then C pooled ones.

    Qb and Kb are the numbers of blocks. Tables are as wide as there are blocks: the CPU lowering asserts it.

    Args:
        block: Rows and keys of a block.
        partial_counts, partial: int32 `[1, H, Qb]`, `[1, H, Qb, Kb]`.
        full_counts, full: The same; never the same tensors, which doesn't compile on the CPU.
        number: int32 `[H, Qb, Kb]`: the row of `bits` that masks a partial block.
        bits: int32 `[P, block, block / 32]`; P is a power of 2, so that few graphs are compiled.
    """

    block: int
    partial_counts: Tensor
    partial: Tensor
    full_counts: Tensor
    full: Tensor
    number: Tensor
    bits: Tensor


def lists_of(index: SparseIndex, block: int) -> FlexLists:
    """Lists of an index on its device, kept in its cache."""
    key = ("flex", block)
    if key not in index.cache:
        index.cache[key] = _build(index, block)
    return index.cache[key]


@on_cpu
def _build(index: SparseIndex, block: int) -> FlexLists:
    cells = max_cells(index)
    rounded = [to_blocks(with_cells(entry, cells), block, block) for entry in index.entries]
    columns = -(-(index.num_keys + cells) // block)
    partial = [full_width(b.partial_offsets, b.partial, columns) for b in rounded]
    full = [full_width(b.full_offsets, b.full, columns) for b in rounded]
    first, numbers = 0, []
    for blocks in rounded:
        numbers.append(_numbers(blocks, columns, first))
        first += len(blocks.partial)
    filled = max(1, 1 << (first - 1).bit_length()) if first else 1
    bits = torch.zeros(filled, block, -(-block // 32), dtype=torch.int32)
    if first:
        torch.cat([b.bits for b in rounded], out=bits[:first])
    heads = list(index.head_to_pattern)
    device = index.entries[0].q_offsets.device

    def by_head(tables: list[Tensor]) -> Tensor:
        return torch.stack([tables[p] for p in heads])[None].contiguous().to(device)

    return FlexLists(
        block,
        by_head([b.partial_offsets.diff() for b in rounded]),
        by_head(partial),
        by_head([b.full_offsets.diff() for b in rounded]),
        by_head(full),
        by_head(numbers)[0],
        bits.to(device),
    )


@on_cpu
def with_cells(entry: PatternIndex, cells: int) -> PatternIndex:
    """An entry whose pooled keys are ordinary ones behind the others; `cells` of them."""
    entry = entry.to("cpu")
    total = entry.num_keys + cells
    if entry.far is None:
        return replace(entry, num_keys=total, k_order=None, cache={})
    groups = torch.arange(entry.num_groups)
    owner = torch.cat(
        [
            groups.repeat_interleave(offsets.diff().long())
            for offsets in (entry.run_offsets, entry.far.run_offsets)
        ]
    )
    pooled = entry.far.runs + torch.tensor([entry.num_keys, 0], dtype=torch.int32)
    rank = owner.argsort(stable=True)
    return replace(
        entry,
        num_keys=total,
        k_order=None,
        run_offsets=entry.run_offsets + entry.far.run_offsets,
        runs=torch.cat([entry.runs, pooled])[rank],
        far=None,
        cache={},
    )


@on_cpu
def full_width(offsets: Tensor, blocks: Tensor, columns: int) -> Tensor:
    """CSR lists as an int32 table `[rows, columns]`, filled up with zeros."""
    rows = len(offsets) - 1
    table = torch.zeros(rows, columns, dtype=torch.int32)
    counts = offsets.diff().long()
    row = torch.repeat_interleave(torch.arange(rows), counts)
    place = torch.arange(len(blocks)) - torch.repeat_interleave(offsets[:-1].long(), counts)
    table[row, place] = blocks
    return table


def _numbers(blocks: BlockIndex, columns: int, first: int) -> Tensor:
    """The number of each partial block, from `first` on, int32 `[Qb, columns]`; 0 elsewhere."""
    rows = len(blocks.partial_offsets) - 1
    table = torch.zeros(rows, columns, dtype=torch.int32)
    row = torch.repeat_interleave(torch.arange(rows), blocks.partial_offsets.diff().long())
    table[row, blocks.partial.long()] = torch.arange(first, first + len(row), dtype=torch.int32)
    return table
