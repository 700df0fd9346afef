"""Blocks of an index, as other packages' kernels want them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ...entry import PatternIndex, expand
from ...index import SparseIndex
from ...on_cpu import on_cpu
from ...rounding import BlockIndex, overlaps, to_blocks
from ..flex_lists import full_width

T = TypeVar("T")


def rounded(index: SparseIndex, block_q: int, block_k: int) -> list[BlockIndex]:
    """The blocks that each entry of an index computes."""
    return [blocks_of(entry, block_q, block_k) for entry in index.entries]


def blocks_of(entry: PatternIndex, block_q: int, block_k: int) -> BlockIndex:
    """The blocks that an entry computes; kept in its cache."""
    return kept(entry, ("blocks", block_q, block_k), lambda: to_blocks(entry, block_q, block_k))


def block_map(index: SparseIndex, block_q: int, block_k: int) -> Tensor:
    """Which blocks each head computes, bool `[H, Qb, Kb]` on the index's device; kept in its cache."""

    def make() -> Tensor:
        return by_head(
            [listed(blocks, index.num_keys) for blocks in rounded(index, block_q, block_k)], index
        )

    return kept(index, ("block map", block_q, block_k), on_cpu(make))


def listed(blocks: BlockIndex, num_keys: int) -> Tensor:
    """Which whole blocks are computed, bool `[Qb, Kb]` on the CPU."""
    rows = len(blocks.full_offsets) - 1
    table = torch.zeros(rows, -(-num_keys // blocks.block_k), dtype=torch.bool)
    row = torch.repeat_interleave(torch.arange(rows), blocks.full_offsets.diff().long())
    table[row, blocks.full.long()] = True
    return table


def block_lists(index: SparseIndex, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block sees, int32 `[H, Qb]`, and which, int32 `[H, Qb, K]`.

    K is the largest of those numbers, or 1. The numbers of key blocks rise and are filled up with 0.
    """

    def make() -> tuple[Tensor, Tensor]:
        found = rounded(index, block_q, block_k)
        counts = [blocks.full_offsets.diff() for blocks in found]
        width = max(1, *(int(count.max()) for count in counts))
        tables = [full_width(blocks.full_offsets, blocks.full, width) for blocks in found]
        return by_head(counts, index), by_head(tables, index)

    return kept(index, ("block lists", block_q, block_k), on_cpu(make))


def kept(index: SparseIndex | PatternIndex, key: tuple[object, ...], make: Callable[[], T]) -> T:
    """What is made of an index or an entry, once."""
    if key not in index.cache:
        index.cache[key] = make()
    return index.cache[key]


def for_batch(index: SparseIndex, key: tuple[object, ...], batch: int, table: Tensor) -> Tensor:
    """A table of an index `[...]` as contiguous `[batch, ...]`, made once for each size of batch."""
    return kept(index, (*key, batch), lambda: table.expand(batch, *table.shape).contiguous())


def by_head(tables: list[Tensor], index: SparseIndex) -> Tensor:
    """Tables of the entries as one `[H, ...]` on the index's device."""
    device = index.entries[0].q_offsets.device
    return torch.stack([tables[p] for p in index.head_to_pattern]).contiguous().to(device)


@on_cpu
def stands_for_the_rest(entry: PatternIndex, block_q: int, block_k: int) -> bool:
    """Whether an entry pools exactly the key blocks that it doesn't see, one pooled key a block.

    Args:
        entry: It has a far field, and sees whole blocks exactly.
        block_q, block_k: Rows and keys of a block.
    """

    def make() -> bool:
        blocks = blocks_of(entry, block_q, block_k)
        return _pools(entry.to("cpu"), ~listed(blocks, entry.num_keys), blocks)

    return kept(entry, ("pooled blocks", block_q, block_k), make)


def _pools(entry: PatternIndex, rest: Tensor, blocks: BlockIndex) -> bool:
    """Whether the groups of an entry pool the key blocks of `rest` `[Qb, Kb]`, each as one key."""
    far, size = entry.far, blocks.block_k
    assert far is not None, "only entries with a far field are asked"
    start, stop = (far.cell_offsets.long()[expand(far.runs) + more] for more in (0, 1))
    if bool((start % size != 0).any()) or bool(
        (stop != (start + size).clamp_max(entry.num_keys)).any()
    ):
        return False
    pooled = torch.zeros(entry.num_groups, rest.shape[1], dtype=torch.bool)
    pooled[
        torch.repeat_interleave(torch.arange(entry.num_groups), entry.group_cells), start // size
    ] = True
    group, row = overlaps(entry, blocks.block_q, entry.num_queries)
    return torch.equal(pooled[group], rest[row])
