"""Parts of the Gluon kernel: which keys a tile and its rows see, and values that none of them sees."""

# Gluon's functions are typed for its compiler, not for callers
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

ROWS: gl.constexpr = gl.constexpr(64)  # of a warpgroup: the M of its products
LAST: gl.constexpr = gl.constexpr(2147483647)


@gluon.jit
def keys(
    tables, j, plane,
    BLOCK_N: gl.constexpr, BEGIN: gl.constexpr, COUNT: gl.constexpr, MASK: gl.constexpr, FAR: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Which keys of a step the tile sees, each one's first and last token, and what raises its logit."""
    Steps, Masks, Cells, _RowStart, _RowStop = tables
    column = BEGIN + gl.arange(0, COUNT, layout=LAYOUT)
    first, kind = gl.load(Steps + j * 2), gl.load(Steps + j * 2 + 1)
    word = gl.load(Masks + (kind >> 1) * (BLOCK_N // 32) + column // 32)
    there = ((word >> (column % 32)) & 1) != 0
    early = first + column
    late = early
    bias = gl.zeros([COUNT], gl.float32, layout=LAYOUT)
    if FAR:
        is_cell = ((kind + column * 0) & 1) != 0
        here = there & is_cell
        cell = Cells + early
        bias = gl.cast(gl.load(cell, mask=here, other=0), gl.float32, bitcast=True)
        if MASK > 0:
            early = gl.where(is_cell, gl.load(cell + plane, mask=here, other=0), early)
            late = gl.where(is_cell, gl.load(cell + 2 * plane, mask=here, other=0), late)
    return there, early, late, bias


@gluon.jit
def clean(
    value, barriers, tables, j, turn, facts,
    D: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, MASK: gl.constexpr, FAR: gl.constexpr,
    WHICH: gl.constexpr,
):  # fmt: skip
    """Make values 0 that no row of the tile sees: each consumer its share of them, the `turn`-th time."""
    SHARE: gl.constexpr = BLOCK_N // CONSUMERS
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    _start, _stop, lowest, highest, plane = facts
    there, early, late, _bias = keys(
        tables, j, plane, BLOCK_N, WHICH * SHARE, SHARE, MASK, FAR, gl.SliceLayout(1, L)
    )
    if MASK > 0:
        there = there & (early >= lowest) & (late < highest)
    mine = value.slice(WHICH * SHARE, SHARE)
    x = mine.load(L)
    mine.store(gl.where(there[:, None], x, 0.0))
    fence_async_shared()
    if CONSUMERS > 1:
        _q_filled, cleaned, _k_filled, _k_empty, _v_filled, _v_empty = barriers
        mbarrier.arrive(cleaned, count=1)
        mbarrier.wait(cleaned, turn & 1)


@gluon.jit
def intervals(
    tables, strides, b, first, rows,
    MASK: gl.constexpr, WHICH: gl.constexpr, CONSUMERS: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """Which rows there are, where their keys start and stop, and where those of the whole tile do."""
    row = WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    real = row < rows
    start = row
    stop = row
    lowest = 0
    highest = 0
    if MASK > 0:
        start, stop = _bounds(tables, strides, b, first, row, real)
        T: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        every = gl.arange(0, ROWS * CONSUMERS, layout=T)
        begin, end = _bounds(tables, strides, b, first, every, every < rows)
        some = end > begin
        lowest = gl.min(gl.where(some, begin, LAST), 0)
        highest = gl.max(gl.where(some, end, 0), 0)
    return real, start, stop, lowest, highest


@gluon.jit
def _bounds(tables, strides, b, first, row, real):
    _Steps, _Masks, _Cells, RowStart, RowStop = tables
    _sob, _soh, _son, stb, stn, spb, spn = strides
    start = gl.load(RowStart + b * stb + (first + row) * stn, mask=real, other=0)
    stop = gl.load(RowStop + b * spb + (first + row) * spn, mask=real, other=0)
    return start, stop


@gluon.jit
def whole_until(
    tables, strides, b, first, rows, low, middle, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr
):
    """Up to which of the plain steps, sorted by their keys, all rows see all keys."""
    T: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    every = gl.arange(0, ROWS * CONSUMERS, layout=T)
    real = every < rows
    start, stop = _bounds(tables, strides, b, first, every, real)
    shortest = gl.min(gl.where(real, stop, LAST), 0)
    latest = gl.max(gl.where(real, start, 0), 0)
    whole = 0
    place = gl.arange(0, 128, layout=T)
    for j in range(low, middle, 128):
        step = j + place
        key = gl.load(tables[0] + step * 2, mask=step < middle, other=LAST)
        whole += gl.sum((key <= shortest - BLOCK_N).to(gl.int32), 0)
    return low + gl.where(latest > 0, 0, whole)
