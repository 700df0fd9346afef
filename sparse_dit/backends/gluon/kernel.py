"""The Gluon kernel for sm_90: attention over keys that lie side by side, loaded by TMA.

Only `launch.py` imports this file, and only when the kernel is about to run: it needs triton.

One warp loads, one or two warpgroups compute 64 query rows each. Keys and values have a ring of buffers each,
with a barrier for "filled" and one for "empty" at every buffer. In a consumer's round the products of the
step's queries and keys and of the last step's weights and values are both in flight; while it computes the
softmax the second still is.

A tile's steps come in three kinds, in this order: PLAIN, all of whose keys all rows see; POOLED, whole steps
of pooled keys; MASKED, the rest: bits say which keys are seen, and intervals which of them each row sees.
Values that no row of the tile sees are made 0 before a product: a weight of 0 would not undo a NaN.

The ring's n-th step uses buffer `n % STAGES` for the `n // STAGES`-th time; the parity of that number is the
phase that a consumer waits for, and a producer waits for the other.
"""

# Gluon's functions are typed for its compiler, not for callers
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .masks import ROWS, clean, intervals, keys, whole_until
from .tables import TILE_FIELDS

TILE: gl.constexpr = gl.constexpr(TILE_FIELDS)
PLAIN: gl.constexpr = gl.constexpr(0)
POOLED: gl.constexpr = gl.constexpr(1)
MASKED: gl.constexpr = gl.constexpr(2)
INTEGERS = [  # never specialised on their values: another resolution must not compile anew
    "sob", "soh", "son", "stb", "stn", "spb", "spn", "heads", "kv_group", "num_queries", "pooled_rows",
]  # fmt: skip


@gluon.jit(do_not_specialize=INTEGERS)
def attend(
    Out, Lse, Cells, RowStart, RowStop, Tiles, Steps, Masks,
    QueryBlocks, KeyBlocks, ValueBlocks, PooledBlocks,
    sob, soh, son, stb, stn, spb, spn, heads, kv_group, num_queries, pooled_rows, scale,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    MASK: gl.constexpr, FAR: gl.constexpr,
):  # fmt: skip
    """One tile of query rows of one head. `scale` is positive, and carries log2(e).

    `MASK` is 0 without row intervals, 1 if the tables were made for them, 2 if they came with the call.
    """
    tile = Tiles + gl.program_id(0) * TILE
    b = gl.program_id(1)
    head = gl.load(tile)
    first, rows = gl.load(tile + 1), gl.load(tile + 2)
    low, middle = gl.load(tile + 3), gl.load(tile + 4)
    pooled_end, high = gl.load(tile + 5), gl.load(tile + 6)
    pooled = gl.load(tile + 7)
    dtype: gl.constexpr = QueryBlocks.dtype
    q = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, D], QueryBlocks.layout)
    k = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], KeyBlocks.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], KeyBlocks.layout)
    q_filled = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    cleaned = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_filled, count=1)
    mbarrier.init(cleaned, count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_filled.index(i), count=1)
        mbarrier.init(v_filled.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    buffers = (q, k, v)
    barriers = (q_filled, cleaned, k_filled, k_empty, v_filled, v_empty)
    blocks = (QueryBlocks, KeyBlocks, ValueBlocks, PooledBlocks)
    tables = (Steps, Masks, Cells, RowStart, RowStop)
    strides = (sob, soh, son, stb, stn, spb, spn)
    where = (b, head, first, rows, low, middle, pooled_end, high, pooled)
    sizes = (heads, num_queries, pooled_rows)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (buffers, barriers, tables, Out, Lse, strides, where, sizes, scale, D, BLOCK_N,
                            STAGES, CONSUMERS, MASK, FAR, 0)),
                (_consume, (buffers, barriers, tables, Out, Lse, strides, where, sizes, scale, D, BLOCK_N,
                            STAGES, CONSUMERS, MASK, FAR, 1)),
                (_produce, (buffers, barriers, blocks, Steps, where, kv_group, D, BLOCK_N, STAGES, CONSUMERS,
                            FAR)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (buffers, barriers, tables, Out, Lse, strides, where, sizes, scale, D, BLOCK_N,
                            STAGES, CONSUMERS, MASK, FAR, 0)),
                (_produce, (buffers, barriers, blocks, Steps, where, kv_group, D, BLOCK_N, STAGES, CONSUMERS,
                            FAR)),
            ],
            [1],
            [24],
        )  # fmt: skip


@gluon.jit
def _produce(
    buffers, barriers, blocks, Steps, where, kv_group,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    FAR: gl.constexpr,
):  # fmt: skip
    """Load the queries, then the keys and values of each step as buffers become empty."""
    q, k, v = buffers
    q_filled, _cleaned, k_filled, k_empty, v_filled, v_empty = barriers
    QueryBlocks, KeyBlocks, ValueBlocks, PooledBlocks = blocks
    b, head, first, _rows, low, _middle, _pooled_end, high, pooled = where
    kv_head = head // kv_group
    size: gl.constexpr = BLOCK_N * D * 2  # bytes, those beyond the last key too
    mbarrier.expect(q_filled, CONSUMERS * ROWS * D * 2)
    for part in gl.static_range(CONSUMERS):
        tma.async_copy_global_to_shared(
            QueryBlocks, [b, head, first + part * ROWS, 0], q_filled, q.index(part)
        )
    batch = gl.num_programs(1)
    start, kind = gl.load(Steps + low * 2), gl.load(Steps + low * 2 + 1)
    for j in range(low, high):
        i = (j - low) % STAGES
        phase = ((j - low) // STAGES) & 1
        key, exact = start, (kind & 1) == 0
        following = gl.minimum(j + 1, high - 1) * 2  # read ahead: a step must not wait for it
        start, kind = gl.load(Steps + following), gl.load(Steps + following + 1)
        mbarrier.wait(k_empty.index(i), phase ^ 1)
        mbarrier.expect(k_filled.index(i), size)
        if FAR:
            if exact:
                tma.async_copy_global_to_shared(
                    KeyBlocks, [b, kv_head, key, 0], k_filled.index(i), k.index(i)
                )
            else:
                tma.async_copy_global_to_shared(
                    PooledBlocks, [b, 0, pooled + key, 0], k_filled.index(i), k.index(i)
                )
        else:
            tma.async_copy_global_to_shared(
                KeyBlocks, [b, kv_head, key, 0], k_filled.index(i), k.index(i)
            )
        mbarrier.wait(v_empty.index(i), phase ^ 1)
        mbarrier.expect(v_filled.index(i), size)
        if FAR:
            if exact:
                tma.async_copy_global_to_shared(
                    ValueBlocks, [b, kv_head, key, 0], v_filled.index(i), v.index(i)
                )
            else:
                tma.async_copy_global_to_shared(
                    PooledBlocks, [batch + b, 0, pooled + key, 0], v_filled.index(i), v.index(i)
                )
        else:
            tma.async_copy_global_to_shared(
                ValueBlocks, [b, kv_head, key, 0], v_filled.index(i), v.index(i)
            )


@gluon.jit
def _consume(
    buffers, barriers, tables, Out, Lse, strides, where, sizes, scale,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    MASK: gl.constexpr, FAR: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """The WHICH-th 64 rows of the tile, over all steps."""
    S: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    OUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16]
    )
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    q, k, v = buffers
    q_filled, _cleaned, k_filled, k_empty, v_filled, _v_empty = barriers
    b, head, first, rows, low, middle, pooled_end, high, pooled = where
    dtype: gl.constexpr = q.dtype
    query = q.index(WHICH).reshape([ROWS, D])
    real, start, stop, lowest, highest = intervals(
        tables, strides, b, first, rows, MASK, WHICH, CONSUMERS, S
    )
    if MASK == 2:
        middle = whole_until(tables, strides, b, first, rows, low, middle, BLOCK_N, CONSUMERS)
    if MASK > 0:
        pooled_end = middle  # a pooled key is seen if all its tokens are: that takes a mask
    m = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
    total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, S))
    acc = gl.zeros([ROWS, D], gl.float32, layout=OUT)
    heads, num_queries, pooled_rows = sizes
    Steps, Masks, Cells, RowStart, RowStop = tables
    tables = (Steps, Masks, Cells + (b * pooled_rows + pooled), RowStart, RowStop)
    plane = gl.num_programs(1) * pooled_rows
    facts = (start, stop, lowest, highest, plane)

    mbarrier.wait(q_filled, 0)
    mbarrier.wait(k_filled.index(0), 0)
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=S)
    key = k.index(0).reshape([BLOCK_N, D]).permute((1, 0))
    s = warpgroup_mma(query, key, zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
    mbarrier.arrive(k_empty.index(0), count=1)
    p, _alpha, m, total = _softmax(
        s, m, total, scale, tables, low, facts, BLOCK_N, MASK, FAR, MASKED, S
    )
    weights = gl.convert_layout(p.to(dtype), P)
    for j in range(low + 1, middle):
        weights, acc, m, total = _round(
            query, weights, acc, m, total, scale, buffers, barriers, tables, j, low, pooled_end, facts,
            D, BLOCK_N, STAGES, CONSUMERS, MASK, FAR, PLAIN, WHICH,
        )  # fmt: skip
    if FAR and MASK == 0:
        for j in range(gl.maximum(low + 1, middle), pooled_end):
            weights, acc, m, total = _round(
                query, weights, acc, m, total, scale, buffers, barriers, tables, j, low, pooled_end, facts,
                D, BLOCK_N, STAGES, CONSUMERS, MASK, FAR, POOLED, WHICH,
            )  # fmt: skip
    masked = gl.maximum(low + 1, pooled_end)
    for j in range(masked, high):
        weights, acc, m, total = _round(
            query, weights, acc, m, total, scale, buffers, barriers, tables, j, low, masked, facts,
            D, BLOCK_N, STAGES, CONSUMERS, MASK, FAR, MASKED, WHICH,
        )  # fmt: skip

    last = high - 1 - low
    mbarrier.wait(v_filled.index(last % STAGES), (last // STAGES) & 1)
    value = v.index(last % STAGES).reshape([BLOCK_N, D])
    clean(
        value, barriers, tables, high - 1, high - masked, facts, D, BLOCK_N, CONSUMERS, MASK, FAR, WHICH
    )  # fmt: skip
    acc = warpgroup_mma(weights, value, acc, is_async=True)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])

    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    lse = gl.where(empty, float("-inf"), (m + gl.log2(total)) * 0.6931471805599453)
    sob, soh, son, _stb, _stn, _spb, _spn = strides
    token = first + WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    gl.store(Lse + (b * heads + head) * num_queries + token, lse, mask=real)
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, OUT))[:, None]
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT)) + WHICH * ROWS
    column = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))
    Out += gl.cast(b, gl.int64) * (sob * 8) + gl.cast(head, gl.int64) * (soh * 8)
    place = Out + ((first + row) * (son * 8))[:, None] + column[None, :]
    gl.store(place, acc.to(dtype), mask=(row < rows)[:, None])


@gluon.jit
def _round(
    query, weights, acc, m, total, scale, buffers, barriers, tables, j, low, masked, facts,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    MASK: gl.constexpr, FAR: gl.constexpr, KIND: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """The products with keys of step j and with values of the step before, in flight together."""
    S: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    OUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16]
    )
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    _q, k, v = buffers
    _q_filled, _cleaned, k_filled, k_empty, v_filled, v_empty = barriers
    i, phase = (j - low) % STAGES, ((j - low) // STAGES) & 1
    before, before_phase = (j - 1 - low) % STAGES, ((j - 1 - low) // STAGES) & 1
    value = v.index(before).reshape([BLOCK_N, D])
    key = k.index(i).reshape([BLOCK_N, D]).permute((1, 0))
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=S)
    if KIND == MASKED:
        mbarrier.wait(v_filled.index(before), before_phase)
        clean(
            value, barriers, tables, j - 1, j - masked, facts, D, BLOCK_N, CONSUMERS, MASK, FAR, WHICH
        )  # fmt: skip
        mbarrier.wait(k_filled.index(i), phase)
        s = warpgroup_mma(query, key, zero, use_acc=False, is_async=True)
    else:
        mbarrier.wait(k_filled.index(i), phase)
        s = warpgroup_mma(query, key, zero, use_acc=False, is_async=True)
        mbarrier.wait(v_filled.index(before), before_phase)
    acc = warpgroup_mma(weights, value, acc, is_async=True)
    s = warpgroup_mma_wait(num_outstanding=1, deps=[s])
    mbarrier.arrive(k_empty.index(i), count=1)
    p, alpha, m, total = _softmax(s, m, total, scale, tables, j, facts, BLOCK_N, MASK, FAR, KIND, S)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
    return gl.convert_layout(p.to(value.dtype), P), acc, m, total


@gluon.jit
def _softmax(
    s, m, total, scale, tables, j, facts,
    BLOCK_N: gl.constexpr, MASK: gl.constexpr, FAR: gl.constexpr, KIND: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """Weights of a step, what the sums so far are multiplied by, and the new largest logit and sum."""
    start, stop, _lowest, _highest, plane = facts
    if KIND == PLAIN:
        m_new = gl.maximum(m, gl.max(s, 1) * scale)
        floor = m_new
        p = gl.exp2(s * scale - m_new[:, None])
    elif KIND == POOLED:
        cell = gl.load(tables[0] + j * 2) + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S))
        bias = gl.load(tables[2] + cell)
        s = s * scale + gl.cast(bias, gl.float32, bitcast=True)[None, :]
        m_new = gl.maximum(m, gl.max(s, 1))
        floor = m_new
        p = gl.exp2(s - m_new[:, None])
    else:
        there, early, late, bias = keys(
            tables, j, plane, BLOCK_N, 0, BLOCK_N, MASK, FAR, gl.SliceLayout(0, S)
        )
        s = s * scale
        if FAR:
            s += bias[None, :]
        seen = there[None, :]
        if MASK > 0:
            seen = seen & (early[None, :] >= start[:, None]) & (late[None, :] < stop[:, None])
        s = gl.where(seen, s, float("-inf"))
        m_new = gl.maximum(m, gl.max(s, 1))
        floor = gl.where(m_new == float("-inf"), 0.0, m_new)  # rows may see nothing yet
        p = gl.exp2(s - floor[:, None])
    alpha = gl.exp2(m - floor)
    return p, alpha, m_new, total * alpha + gl.sum(p, 1)
