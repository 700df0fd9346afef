"""PyTorch's compiled FlexAttention with the same lists, for comparison."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..index import SparseIndex
from ..rounding import to_blocks
from .lists import BLOCK

Compiled = Callable[..., Tensor]


def compiled(threads: int) -> Compiled:
    """FlexAttention, compiled anew for each shape that it meets (seconds; about 20 the first time).

    What was compiled for earlier shapes is dropped: PyTorch limits how many there may be.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    # inductor writes the number of threads into the code that it makes
    return torch.compile(
        flex_attention, fullgraph=True, dynamic=False, options={"cpp.threads": threads}
    )


def flex_call(
    flex: Compiled, q: Tensor, k: Tensor, v: Tensor, index: SparseIndex
) -> Callable[[], Tensor] | None:
    """A call that computes the index with FlexAttention, `[1, H, N, D]`; None if it can't exactly.

    It can where all blocks of 64 x 64 are seen wholly, in the order of the tokens, with no far field.

    Raises:
        NotImplementedError: If it can't be compiled on this machine.
    """
    if any(entry.q_order is not None or entry.far is not None for entry in index.entries):
        return None
    lists = [to_blocks(entry, BLOCK, BLOCK) for entry in index.entries]
    if any(len(blocks.partial) for blocks in lists):
        return None
    from torch.nn.attention.flex_attention import BlockMask

    rows, columns = -(-q.shape[2] // BLOCK), -(-k.shape[2] // BLOCK)
    counts = torch.stack([lists[p].full_offsets.diff() for p in index.head_to_pattern])[None]
    tables = [_table(blocks.full_offsets, blocks.full, rows, columns) for blocks in lists]
    table = torch.stack([tables[p] for p in index.head_to_pattern])[None]
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts), torch.zeros_like(table), counts, table, BLOCK_SIZE=BLOCK,
        seq_lengths=(q.shape[2], k.shape[2]), compute_q_blocks=False,
    )  # fmt: skip

    def call() -> Tensor:
        return flex(q, k, v, block_mask=mask)

    try:
        call()
    except Exception as error:  # whatever inductor, its compiler or its cache may raise
        first = str(error).strip().splitlines() or [""]
        raise NotImplementedError(
            f"FlexAttention must compile to be compared with, got {type(error).__name__}: "
            f"{first[0]}; pass --no-flex to do without"
        ) from error
    return call


def _table(offsets: Tensor, blocks: Tensor, rows: int, columns: int) -> Tensor:
    """CSR lists as a table `[rows, columns]`, filled up with zeros."""
    table = torch.zeros(rows, columns, dtype=torch.int32)
    counts = offsets.diff().long()
    row = torch.repeat_interleave(torch.arange(rows), counts)
    place = torch.arange(len(blocks)) - torch.repeat_interleave(offsets[:-1].long(), counts)
    table[row, place] = blocks
    return table
