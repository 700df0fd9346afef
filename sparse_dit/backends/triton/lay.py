# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
"""The Triton kernel that writes the tables of blocks that were chosen on the device; see `frames.py`.

Only `laid.py` imports this file, and only when a kernel is about to run: it needs triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tables import TILE_FIELDS, TILE_STEPS

TILE: tl.constexpr = tl.constexpr(TILE_FIELDS)
ROWS: tl.constexpr = tl.constexpr(3)  # fields of a tile known before: first row, rows, group
EACH: tl.constexpr = tl.constexpr(TILE_STEPS)
POINTERS = [  # slices begin anywhere
    "Bits", "PieceBlock", "PieceKeys", "PieceLast", "SmallBlock", "SmallToken", "CellBlock", "TileRows",
    "TileStart", "Keys", "Tiles", "Steps", "Lasts", "Cells", "Cost", "Pairs",
]  # fmt: skip
INTEGERS = [
    "blocks", "row_bytes", "tiles", "whole", "pieces", "small", "cells", "first_packed", "most_steps",
    "most_small", "most_cells",
]  # fmt: skip


@triton.jit
def _seen(bits, Block, at, there, everything):
    """Which items are in blocks that the list sees; those of no block (-1) always are."""
    block = tl.load(Block + at, mask=there, other=-1)
    known = there & (block >= 0) & (everything == 0)
    byte = tl.load(bits + (block >> 3), mask=known, other=255).to(tl.int32)
    return there & (((byte >> (block & 7)) & 1) > 0)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=POINTERS)
def lay(
    Bits, PieceBlock, PieceKeys, PieceLast, SmallBlock, SmallToken, CellBlock, TileRows, TileStart,
    Keys, Tiles, Steps, Lasts, Cells, Cost, Pairs,
    blocks, row_bytes, tiles, whole, pieces, small, cells, first_packed, most_steps, most_small, most_cells,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, INTERVALS: tl.constexpr,
):  # fmt: skip
    """The list of one block of query rows, or of the rows that see everything, of one head; and its tiles."""
    row, head = tl.program_id(0), tl.program_id(1)
    lists = tl.num_programs(0)
    everything = (row == blocks).to(tl.int32)
    bits = Bits + (head.to(tl.int64) * blocks + row) * row_bytes
    number = (head * lists + row).to(tl.int64)
    Steps += number * most_steps
    Lasts += number * most_steps
    offs = tl.arange(0, CHUNK)

    count = 0
    for i in tl.range(0, whole, CHUNK):
        at = i + offs
        seen = _seen(bits, PieceBlock, at, at < whole, everything)
        some = seen.to(tl.int32)
        step = count + tl.cumsum(some, 0) - 1
        tl.store(Steps + step, at * BLOCK_N, mask=seen)
        if INTERVALS:
            tl.store(Lasts + step, tl.load(PieceLast + at, mask=seen, other=0), mask=seen)
        count += tl.sum(some, 0)
    keys = count * BLOCK_N

    place = first_packed + number * most_small
    packed = 0
    for i in tl.range(0, small, CHUNK):
        at = i + offs
        there = at < small
        seen = _seen(bits, SmallBlock, at, there, everything)
        some = seen.to(tl.int32)
        token = tl.load(SmallToken + at, mask=there, other=-1)
        tl.store(Keys + place + packed + tl.cumsum(some, 0) - 1, token, mask=seen)
        packed += tl.sum(some, 0)
    keys += packed
    full = packed // BLOCK_N
    fill = packed + tl.arange(0, BLOCK_N)
    left = packed > full * BLOCK_N
    tl.store(
        Keys + place + fill,
        tl.full([BLOCK_N], -1, tl.int32),
        mask=left & (fill < (full + 1) * BLOCK_N),
    )
    for i in tl.range(0, full, CHUNK):
        at = i + offs
        tl.store(Steps + count + at, (place + at * BLOCK_N).to(tl.int32), mask=at < full)
        if INTERVALS:  # their last keys aren't known
            tl.store(Lasts + count + at, tl.full([CHUNK], 2147483647, tl.int32), mask=at < full)
    count += full

    middle = count
    for i in tl.range(whole, pieces, CHUNK):
        at = i + offs
        there = at < pieces
        seen = _seen(bits, PieceBlock, at, there, everything)
        some = seen.to(tl.int32)
        tl.store(Steps + count + tl.cumsum(some, 0) - 1, at * BLOCK_N, mask=seen)
        count += tl.sum(some, 0)
        keys += tl.sum(tl.load(PieceKeys + at, mask=seen, other=0), 0)
    tl.store(Steps + count, (place + full * BLOCK_N).to(tl.int32), mask=left)
    count += left.to(tl.int32)

    Cells += number * most_cells
    pooled = 0
    for i in tl.range(0, cells, CHUNK):
        at = i + offs
        there = at < cells
        far = there & (_seen(bits, CellBlock, at, there, everything) == 0)
        some = far.to(tl.int32)
        tl.store(Cells + pooled + tl.cumsum(some, 0) - 1, at, mask=far)
        pooled += tl.sum(some, 0)
    far_steps = (pooled + BLOCK_N - 1) // BLOCK_N
    fill = pooled + tl.arange(0, BLOCK_N)
    tl.store(Cells + fill, tl.full([BLOCK_N], -1, tl.int32), mask=fill < far_steps * BLOCK_N)

    low, far_low = row * most_steps, row * (most_cells // BLOCK_N)
    rows = tl.zeros([], tl.int64)
    for t in tl.range(tl.load(TileStart + row), tl.load(TileStart + row + 1)):
        known, tile = TileRows + t * ROWS, Tiles + (head * tiles + t).to(tl.int64) * TILE
        mine = tl.load(known + 1)
        tl.store(tile, tl.load(known))
        tl.store(tile + 1, mine)
        tl.store(tile + 2, low)
        tl.store(tile + 3, low + middle)
        tl.store(tile + 4, low + count)
        tl.store(tile + 5, far_low)
        tl.store(tile + 6, far_low + far_steps)
        tl.store(tile + 7, tl.load(known + 2))
        tl.store(Cost + head * tiles + t, count + far_steps + EACH)
        rows += mine
    tl.store(Pairs + number, (rows * (keys + pooled)).to(tl.int64))
