"""The Triton kernels: attention over lists of steps, pooled keys, and block mass.

Only `launch.py` imports this file, and only when a kernel is about to run: it needs triton.

A step is a block of places in a table of key tokens; its keys are fetched row by row, so that sorting
costs no copy and columns fill whole steps. What the next step fetches is carried in registers: were the
table read in the step that needs it, Triton would not fetch keys ahead (measured on what it compiles to:
shared memory then no longer grows with the number of stages).

Channels come as D0, a power of two, and D1, what is left of head_dim or 0; strides in units of 8 elements.
Row intervals are read with MASK alone: 1 if the tables were made for them, so that steps which all rows of
a tile see are known and others left out; 2 if they came with the call: then steps are sorted by their last
key, and those that end before the intervals of all rows do are counted first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tables import HEAD_FIELDS, SLOT_FIELDS, TILE_BITS, TILE_FIELDS

HEAD: tl.constexpr = tl.constexpr(HEAD_FIELDS)
SLOT: tl.constexpr = tl.constexpr(SLOT_FIELDS)
TILE: tl.constexpr = tl.constexpr(TILE_FIELDS)
BITS: tl.constexpr = tl.constexpr(TILE_BITS)
LOW: tl.constexpr = tl.constexpr((1 << TILE_BITS) - 1)
INTEGERS = [  # never specialised on their values: another resolution must not compile anew
    "sqb", "sqh", "sqn", "skb", "skh", "skn", "svb", "svh", "svn", "sob", "soh", "son",
    "stb", "stn", "spb", "spn", "heads", "kv_group", "num_queries", "num_keys", "pooled_rows", "groups",
    "mass_block", "mass_blocks",
]  # fmt: skip


@triton.jit
def _table(Heads, head, field: tl.constexpr):
    """A table's address, as a pointer to int32."""
    return tl.load(Heads + head * HEAD + field).to(tl.pointer_type(tl.int32))


@triton.jit
def _load(base, row, stride, mask, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `[rows, WIDTH]` of channels from FIRST on; `mask` of rows, or None."""
    column = FIRST + tl.arange(0, WIDTH)
    where = base + (row * (stride * 8))[:, None] + column[None, :]
    if FIRST + WIDTH > D:
        inside = column[None, :] < D
        if mask is not None:
            inside = inside & mask[:, None]
        return tl.load(where, mask=inside, other=0.0)
    if mask is not None:
        return tl.load(where, mask=mask[:, None], other=0.0)
    return tl.load(where)


@triton.jit
def _logits(q0, q1, K, row, stride, mask, D: tl.constexpr, D0: tl.constexpr,
            D1: tl.constexpr):  # fmt: skip
    """Products of queries and the keys in `row`, float32 `[BLOCK_M, BLOCK_N]`."""
    k0 = _load(K, row, stride, mask, D, 0, D0)
    s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if D1 > 0:
        k1 = _load(K, row, stride, mask, D, D0, D1)
        s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
    return s


@triton.jit
def _accumulate(p, acc0, acc1, alpha, V, row, stride, mask, D: tl.constexpr, D0: tl.constexpr,
                D1: tl.constexpr):  # fmt: skip
    """Add weighted values to what was rescaled."""
    v0 = _load(V, row, stride, mask, D, 0, D0)
    acc0 = tl.dot(p.to(v0.dtype), v0, acc0 * alpha[:, None], input_precision="ieee")
    if D1 > 0:
        v1 = _load(V, row, stride, mask, D, D0, D1)
        acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * alpha[:, None], input_precision="ieee")
    return acc0, acc1


@triton.jit
def _masked_weights(s, seen, m):
    """Online softmax where rows may see nothing yet; `s` in units of log 2."""
    s = tl.where(seen, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    floor = tl.where(m_new == float("-inf"), 0.0, m_new)
    return tl.math.exp2(s - floor[:, None]), tl.math.exp2(m - floor), m_new


@triton.jit
def _interval(RowStart, RowStop, b, q_token, real, stb, stn, spb, spn):
    """Where each row's keys start and stop, `[BLOCK_M]`; and the same of all rows of the tile together."""
    start = tl.load(RowStart + b * stb + q_token * stn, mask=real, other=0)
    stop = tl.load(RowStop + b * spb + q_token * spn, mask=real, other=0)
    some = stop > start
    lowest, highest = tl.where(some, start, 2147483647), tl.where(some, stop, 0)
    return start, stop, tl.min(lowest, 0), tl.max(highest, 0)


@triton.jit
def _whole_until(lasts, low, middle, start, stop, real):
    """Up to which of a list's full steps, sorted by their last key, all rows see all keys."""
    shortest = tl.min(tl.where(real, stop, 2147483647), 0)
    whole = 0
    for j in tl.range(low, middle, 64, num_stages=1):
        step = j + tl.arange(0, 64)
        last = tl.load(lasts + step, mask=step < middle, other=2147483647)
        whole += tl.sum((last < shortest).to(tl.int32), 0)
    return low + tl.where(tl.max(tl.where(real, start, 0), 0) > 0, 0, whole)


@triton.jit
def _seen(token, q_token, start, stop, lowest, highest, MASK: tl.constexpr):
    """Which keys some row sees, `[BLOCK_N]`, and which each row does, `[BLOCK_M, BLOCK_N]`."""
    there = token >= 0
    if MASK > 0:
        there = there & (token >= lowest) & (token < highest)
    seen = there[None, :] & (q_token >= 0)[:, None]
    if MASK > 0:
        seen = seen & (token[None, :] >= start[:, None]) & (token[None, :] < stop[:, None])
    return there, seen


@triton.jit(do_not_specialize=INTEGERS)
def attend(
    Q, K, V, Out, Lse, Pooled, Cells, RowStart, RowStop, Work, Heads,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, stb, stn, spb, spn,
    heads, kv_group, num_queries, pooled_rows, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, HAS_FAR: tl.constexpr, AHEAD: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """One tile of query rows of one head. `scale` is positive, and carries log2(e)."""
    item = tl.load(Work + tl.program_id(0))
    b = tl.program_id(1).to(tl.int64)
    head = item >> BITS
    tile = _table(Heads, head, 0) + (item & LOW) * TILE
    first, rows = tl.load(tile), tl.load(tile + 1)
    low, middle, high = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    kv_head = (head // kv_group).to(tl.int64)
    K += b * (skb * 8) + kv_head * (skh * 8)
    V += b * (svb * 8) + kv_head * (svh * 8)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    real = offs_m < rows
    q_token = tl.load(_table(Heads, head, 1) + first + offs_m, mask=real, other=0)
    Q += b * (sqb * 8) + head.to(tl.int64) * (sqh * 8)
    q0 = _load(Q, q_token, sqn, real, D, 0, D0)
    q1 = q0
    if D1 > 0:
        q1 = _load(Q, q_token, sqn, real, D, D0, D1)
    start = q_token
    stop = q_token
    lowest = 0
    highest = 0
    if MASK > 0:
        start, stop, lowest, highest = _interval(
            RowStart, RowStop, b, q_token, real, stb, stn, spb, spn
        )
    if MASK == 2:
        middle = _whole_until(_table(Heads, head, 8), low, middle, start, stop, real)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = acc0
    if D1 > 0:
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)

    keys, steps = _table(Heads, head, 2), _table(Heads, head, 3)
    place = tl.load(steps + low, mask=low < middle, other=0)
    token = tl.load(keys + place + offs_n)
    place = tl.load(steps + low + 1, mask=low + 1 < middle, other=0)
    for j in tl.range(low, middle):
        row = token
        token = tl.load(keys + place + offs_n)
        place = tl.load(steps + j + 2, mask=j + 2 < middle, other=0)
        s = _logits(q0, q1, K, row, skn, None, D, D0, D1)
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.math.exp2(s * scale - m_new[:, None])
        alpha = tl.math.exp2(m - m_new)
        total = total * alpha + tl.sum(p, 1)
        acc0, acc1 = _accumulate(p, acc0, acc1, alpha, V, row, svn, None, D, D0, D1)
        m = m_new

    place = tl.load(steps + middle, mask=middle < high, other=0)
    token = tl.load(keys + place + offs_n)
    place = tl.load(steps + middle + 1, mask=middle + 1 < high, other=0)
    for j in tl.range(middle, high, num_stages=None if PARTIAL else 1):  # else such steps are few
        row = token
        token = tl.load(keys + place + offs_n)
        place = tl.load(steps + j + 2, mask=j + 2 < high, other=0)
        there, seen = _seen(row, q_token, start, stop, lowest, highest, MASK)
        s = _logits(q0, q1, K, row, skn, there, D, D0, D1) * scale
        p, alpha, m = _masked_weights(s, seen, m)
        total = total * alpha + tl.sum(p, 1)
        acc0, acc1 = _accumulate(p, acc0, acc1, alpha, V, row, svn, there, D, D0, D1)

    if HAS_FAR:
        base = b * pooled_rows + tl.load(Heads + head * HEAD + 6)  # the row before is of no cell
        all_rows = tl.num_programs(1).to(tl.int64) * pooled_rows
        PooledK = Pooled + base * D
        PooledV = PooledK + all_rows * D
        Cells += base
        cells, steps = _table(Heads, head, 4), _table(Heads, head, 5)
        low, high = tl.load(tile + 5), tl.load(tile + 6)
        place = tl.load(steps + low, mask=low < high, other=0)
        cell = tl.load(cells + place + offs_n)
        place = tl.load(steps + low + 1, mask=low + 1 < high, other=0)
        for j in tl.range(low, high, num_stages=None if AHEAD else 1):
            if AHEAD:
                row = cell
                cell = tl.load(cells + place + offs_n)
                place = tl.load(steps + j + 2, mask=j + 2 < high, other=0)
            else:
                row = tl.load(cells + tl.load(steps + j) + offs_n)
            bias = tl.load(Cells + row).to(tl.float32, bitcast=True)
            s = _logits(q0, q1, PooledK, row, D // 8, None, D, D0, D1) * scale + bias[None, :]
            if MASK > 0:
                early = tl.load(Cells + all_rows + row)
                late = tl.load(Cells + 2 * all_rows + row)
                inside = (early[None, :] >= start[:, None]) & (late[None, :] < stop[:, None])
                s = tl.where(inside, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            floor = m_new
            if MASK > 0:
                floor = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.math.exp2(s - floor[:, None])
            alpha = tl.math.exp2(m - floor)
            total = total * alpha + tl.sum(p, 1)
            acc0, acc1 = _accumulate(p, acc0, acc1, alpha, PooledV, row, D // 8, None, D, D0, D1)
            m = m_new

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (m + tl.math.log2(total)) * 0.6931471805599453)
    tl.store(Lse + (b * heads + head) * num_queries + q_token, lse, mask=real)
    Out += b * (sob * 8) + head.to(tl.int64) * (soh * 8)
    where = Out + (q_token * (son * 8))[:, None]
    column = tl.arange(0, D0)
    tl.store(where + column[None, :], (acc0 / total[:, None]).to(Out.dtype.element_ty),
             mask=real[:, None] & (column < D)[None, :])  # fmt: skip
    if D1 > 0:
        column = D0 + tl.arange(0, D1)
        tl.store(where + column[None, :], (acc1 / total[:, None]).to(Out.dtype.element_ty),
                 mask=real[:, None] & (column < D)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def pool(
    K, V, Pooled, Cells, Valid, Slots,
    skb, skh, skn, svb, svh, svn, pooled_rows,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Mean key and value of a cell's valid tokens, log2 of their number (-inf for 0), the first and last.

    `Pooled` is `[2, B, rows, D]`: keys, then values; `Cells` int32 `[3, B, rows]`: the logarithm's bits, then
    the tokens. Before a slot's cells comes one of no tokens, which stands for -1 in the tables.
    """
    cell = tl.program_id(0) - 1
    slot = Slots + tl.program_id(1) * SLOT
    b = tl.program_id(2).to(tl.int64)
    if cell < tl.load(slot + 2):
        keys = tl.load(slot).to(tl.pointer_type(tl.int32))
        offsets = tl.load(slot + 1).to(tl.pointer_type(tl.int32))
        kv_head = tl.load(slot + 4)
        K += b * (skb * 8) + kv_head * (skh * 8)
        V += b * (svb * 8) + kv_head * (svh * 8)
        lowest = 0
        highest = 0
        if MASKED:
            lowest, highest = tl.load(Valid + b * 2), tl.load(Valid + b * 2 + 1)
        start, stop = tl.load(offsets + tl.maximum(cell, 0)), tl.load(offsets + cell + 1)
        sum_k = tl.zeros([WIDTH], tl.float32)
        sum_v = tl.zeros([WIDTH], tl.float32)
        count = tl.zeros([ROWS], tl.int32)
        first = tl.full([ROWS], 2147483647, tl.int32)
        last = tl.full([ROWS], -1, tl.int32)
        for i in tl.range(start, stop, ROWS):
            offs = i + tl.arange(0, ROWS)
            token = tl.load(keys + offs, mask=offs < stop, other=-1)
            there = token >= 0
            if MASKED:
                there = there & (token >= lowest) & (token < highest)
            sum_k += tl.sum(_load(K, token, skn, there, D, 0, WIDTH).to(tl.float32), 0)
            sum_v += tl.sum(_load(V, token, svn, there, D, 0, WIDTH).to(tl.float32), 0)
            count += there.to(tl.int32)
            first = tl.minimum(first, tl.where(there, token, 2147483647))
            last = tl.maximum(last, tl.where(there, token, -1))
        size = tl.sum(count, 0).to(tl.float32)
        some = tl.maximum(size, 1.0)
        row = b * pooled_rows + tl.load(slot + 3) + cell
        all_rows = tl.num_programs(2).to(tl.int64) * pooled_rows
        column = tl.arange(0, WIDTH)
        mean_k = (sum_k / some).to(Pooled.dtype.element_ty)
        mean_v = (sum_v / some).to(Pooled.dtype.element_ty)
        tl.store(Pooled + row * D + column, mean_k, mask=column < D)
        tl.store(Pooled + (all_rows + row) * D + column, mean_v, mask=column < D)
        bias = tl.where(size > 0, tl.math.log2(some), float("-inf"))
        tl.store(Cells + row, bias.to(tl.int32, bitcast=True))
        tl.store(Cells + all_rows + row, tl.min(first, 0))
        tl.store(Cells + 2 * all_rows + row, tl.max(last, 0))


@triton.jit(do_not_specialize=INTEGERS)
def mass(
    Q, K, Lse, Mass, RowStart, RowStop, Work, Heads,
    sqb, sqh, sqn, skb, skh, skn, stb, stn, spb, spn,
    heads, kv_group, num_queries, groups, mass_block, mass_blocks, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Probability of the keys seen exactly, from an LSE, added up by group and block of keys."""
    item = tl.load(Work + tl.program_id(0))
    b = tl.program_id(1).to(tl.int64)
    head = item >> BITS
    tile = _table(Heads, head, 0) + (item & LOW) * TILE
    first, rows = tl.load(tile), tl.load(tile + 1)
    low, high, group = tl.load(tile + 2), tl.load(tile + 4), tl.load(tile + 7)
    K += b * (skb * 8) + (head // kv_group).to(tl.int64) * (skh * 8)
    Q += b * (sqb * 8) + head.to(tl.int64) * (sqh * 8)
    offs_m = tl.arange(0, BLOCK_M)
    real = offs_m < rows
    q_token = tl.load(_table(Heads, head, 1) + first + offs_m, mask=real, other=0)
    q0 = _load(Q, q_token, sqn, real, D, 0, D0)
    q1 = q0
    if D1 > 0:
        q1 = _load(Q, q_token, sqn, real, D, D0, D1)
    where = Lse + (b * heads + head) * num_queries + q_token
    lse = tl.load(where, mask=real, other=float("-inf"))
    start = q_token
    stop = q_token
    lowest = 0
    highest = 0
    if MASK > 0:
        start, stop, lowest, highest = _interval(
            RowStart, RowStop, b, q_token, real, stb, stn, spb, spn
        )
    real = lse > float("-inf")
    floor = tl.where(real, lse * 1.4426950408889634, 0.0)
    keys, steps = _table(Heads, head, 2), _table(Heads, head, 3)
    positions = _table(Heads, head, 7)
    Mass += ((b * heads + head) * groups + group) * mass_blocks
    for j in tl.range(low, high):
        place = tl.load(steps + j) + tl.arange(0, BLOCK_N)
        token = tl.load(keys + place)
        there, seen = _seen(token, q_token, start, stop, lowest, highest, MASK)
        s = _logits(q0, q1, K, token, skn, there, D, D0, D1) * scale
        p = tl.math.exp2(s - floor[:, None])
        p = tl.where(seen & real[:, None], p, 0.0)
        block = tl.load(positions + place, mask=there, other=0) // mass_block
        tl.atomic_add(Mass + block, tl.sum(p, 0), mask=there)
