"""From tensors to launches. Needs triton; `__init__.py` imports it when a kernel is about to run."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...index import SparseIndex
from ...intervals import RowIntervals
from ..attended import Attended
from . import kernel as written
from .config import Config, power_of_two
from .work import Work, work_of

kernel: Any = written  # Triton launches its functions with a grid and with options

POOL_ROWS = 32
UNIT = 8  # strides are passed in units of so many elements


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    rows: RowIntervals | None,
    scale: float,
    configs: tuple[Config, Config],
) -> Attended:
    """Attention and its LSE, `[B, H, N, D]` and float32 `[B, H, N]`."""
    batch, heads, queries, dim = q.shape
    work = work_of(index, k.shape[1], *configs)
    q, k, v = _readable(q), _readable(k), _readable(v)
    q, scale = _positive(q, scale)
    out = torch.empty_like(q)
    if _strides(out) is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    pooled = _pooled(k, v, work, rows, queries)
    bounds, strides = _bounds(index, rows, lse)
    config = work.config
    kernel.attend[(len(work.order), batch)](
        q, k, v, out, lse, *pooled, *bounds, work.order, work.heads,
        *_units(q), *_units(k), *_units(v), *_units(out), *strides,
        heads, heads // k.shape[1], queries, work.pooled_rows,
        scale / math.log(2),
        D=dim, **widths(config, dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        MASK=_mask(index, rows), HAS_FAR=work.pooled_rows > 0,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return Attended(out, lse)


def block_mass(
    q: Tensor,
    k: Tensor,
    index: SparseIndex,
    lse: Tensor,
    rows: RowIntervals | None,
    scale: float,
    mass_block: int,
    config: Config,
) -> Tensor:
    """Mass from an LSE, float32 `[B, H, G, ceil(M / mass_block)]`."""
    batch, heads, queries, dim = q.shape
    work = work_of(index, k.shape[1], config, config, by_group=True)
    q, k, lse = _readable(q), _readable(k), lse.contiguous()
    q, scale = _positive(q, scale)
    groups, blocks = index.max_groups, -(-k.shape[2] // mass_block)
    mass = torch.zeros(batch, heads, groups, blocks, dtype=torch.float32, device=q.device)
    bounds, strides = _bounds(index, rows, lse)
    kernel.mass[(len(work.order), batch)](
        q, k, lse, mass, *bounds, work.order, work.heads,
        *_units(q), *_units(k), *strides,
        heads, heads // k.shape[1], queries, groups, mass_block, blocks,
        scale / math.log(2),
        D=dim, **widths(config, dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        MASK=_mask(index, rows),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return mass


def _mask(index: SparseIndex, rows: RowIntervals | None) -> int:
    """What the kernels call MASK."""
    return 0 if rows is None else 1 if rows is index.rows else 2


def _bounds(
    index: SparseIndex, rows: RowIntervals | None, unused: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[int, int, int, int]]:
    """Where rows' keys start and stop, int32 `[N]` or `[B, N]`; the strides of both by batch item and row."""
    if rows is None:
        return (unused, unused), (0, 0, 0, 0)
    if "no bounds" not in index.cache:  # what stands for a bound that isn't given
        make = functools.partial(torch.full, (), dtype=torch.int32, device=unused.device)
        index.cache["no bounds"] = (make(0), make(2**31 - 1))
    none = index.cache["no bounds"]
    given = (rows.start, rows.stop)
    start, stop = (instead if x is None else x for x, instead in zip(given, none, strict=True))
    return (start, stop), (*_row_strides(start), *_row_strides(stop))


def _row_strides(bound: Tensor) -> tuple[int, int]:
    strides = (0, 0, *bound.stride())
    return strides[-2], strides[-1]


def _pooled(
    k: Tensor, v: Tensor, work: Work, rows: RowIntervals | None, num_queries: int
) -> tuple[Tensor, ...]:
    """Pooled keys and values `[B, rows, D]`, log2 of sizes, first and last tokens `[B, rows]`."""
    shape = (k.shape[0], work.pooled_rows)
    means, values = k.new_empty(2, *shape, k.shape[3])  # of whole 16 bytes each
    bias = torch.empty(shape, dtype=torch.float32, device=k.device)
    first = torch.empty(shape, dtype=torch.int32, device=k.device)
    last = torch.empty_like(first)
    if work.pooled_rows:
        valid = bias if rows is None else _valid(rows, k, num_queries)
        kernel.pool[(work.cells, len(work.slots), k.shape[0])](
            k, v, means, values, bias, first, last, valid, work.slots,
            *_units(k), *_units(v), work.pooled_rows,
            D=k.shape[3], WIDTH=power_of_two(k.shape[3]), ROWS=POOL_ROWS, MASKED=rows is not None,
            num_warps=1,
        )  # fmt: skip
    return means, values, bias, first, last


def _valid(rows: RowIntervals, k: Tensor, num_queries: int) -> Tensor:
    """The keys that are in some row's interval, int32 `[B, 2]`."""
    valid = rows.valid(k.shape[2], num_queries)
    return valid.int().expand(k.shape[0], 2).contiguous()


def widths(config: Config, dim: int) -> dict[str, int]:
    """The kernels' pieces of channels."""
    return dict(zip(("D0", "D1"), config.channels(dim), strict=True))


def _readable(x: Tensor) -> Tensor:
    """Itself if the kernels can address it, 16 bytes at a time, else a copy."""
    if _strides(x) is not None and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _strides(x: Tensor) -> tuple[int, int, int] | None:
    """Strides of batch, heads and tokens in units; None if they aren't whole, or a head is too long."""
    b, h, n, d = x.stride()
    if d != 1 or b % UNIT or h % UNIT or n % UNIT or n * x.shape[2] >= 1 << 31:
        return None
    return b // UNIT, h // UNIT, n // UNIT


def _units(x: Tensor) -> tuple[int, int, int]:
    units = _strides(x)
    assert units is not None, "what is read was made readable"
    return units


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The kernel takes the largest product before it scales: the scale must be positive."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
