"""From blocks that were chosen on the device to a launch, without a wait for the device. Needs triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import lay as written
from .bound import launch
from .chosen import ChosenBlocks, ChosenIndex
from .config import Config
from .frames import Frame, Part, frame_of
from .work import Work, in_order

kernel: Any = written  # Triton launches its functions with a grid and with options

CHUNK, WARPS = 512, 1  # items of a list at once, and what works on them
KEPT = 0.02  # of the memory of k and v: tables up to which they are kept for other calls


def chosen_work(
    index: ChosenIndex,
    k: Tensor,
    small: Config,
    large: Config,
    *,
    intervals: bool = False,
    by_group: bool = False,
) -> Work:
    """The work of an index, as `work_of`, in an order that is found on the device; kept if it is small.

    Args:
        index: The index, on the device of the launch.
        k: Keys `[B, num_kv_heads, M, D]`, whose memory says what is small.
        small, large, by_group: As for `work_of`.
        intervals: Whether rows of the call have intervals, for which the last keys of steps are told.
    """
    name = ("triton", k.shape[1], small, large, intervals, by_group)
    work = index.cache.get(name)
    if work is None:
        frame = frame_of(index.frame, k.shape[1], (small, large), intervals, by_group, index.device)
        work = _work(index, frame)
        if work.num_bytes <= KEPT * 2 * k.nbytes:
            index.cache[name] = work
    return work


def _work(index: ChosenIndex, frame: Frame) -> Work:
    tables = torch.empty(frame.size, dtype=torch.int32, device=index.device)
    cost = frame.cost.clone()
    lists = sum(part.grid.lists * len(part.heads) for part in frame.parts)
    pairs = torch.empty(lists, dtype=torch.int64, device=index.device)
    first = 0
    for part in frame.parts:
        _lay(index, part, tables, cost[part.first_item :], pairs[first:])
        first += part.grid.lists * len(part.heads)
    every = len(index.heads) * index.num_tokens**2
    index.cache["density"] = (pairs.sum(dtype=torch.float64) + frame.pairs) / every
    heads = torch.add(frame.fields, frame.chosen, alpha=tables.data_ptr())
    return Work(
        frame.config,
        in_order(frame.items, cost, len(index.heads)),
        heads,
        frame.slots,
        frame.cells,
        frame.pooled_rows,
        (frame, tables),
        frame.partial,
        tables.nbytes + frame.items.nbytes + heads.nbytes + pairs.nbytes,
    )


def _lay(index: ChosenIndex, part: Part, tables: Tensor, cost: Tensor, pairs: Tensor) -> None:
    """Write the tables of some heads."""
    grid = part.grid
    bits = torch.stack([_bits(index.heads[head]) for head in part.heads])
    keys, first_packed = grid.keys, 0
    if grid.most_small:
        first_packed = len(keys)
        tables[part.keys : part.keys + first_packed].copy_(keys)
        keys = tables[part.keys :]
    launch(
        kernel, "lay", (grid.lists, len(part.heads), 1), (), {"num_warps": WARPS},
        (bits, grid.piece_block, grid.piece_keys, grid.piece_last, grid.small_block,
         grid.small_tokens, grid.cell_block, grid.tile_rows, grid.tile_start,
         keys, tables[part.tiles :], tables[part.steps :],
         tables[part.steps if part.lasts is None else part.lasts :], tables[part.cells :], cost, pairs),
        (grid.blocks, bits.shape[-1], len(grid.tile_rows), grid.whole, len(grid.piece_block),
         len(grid.small_block), len(grid.cell_block), first_packed,
         grid.most_steps, grid.most_small, grid.most_cells),
        None,
        (grid.block_n, CHUNK, part.lasts is not None),
    )  # fmt: skip


def _bits(head: object) -> Tensor:
    assert isinstance(head, ChosenBlocks), "others have tables already"
    return head.bits
