"""From tensors to launches. Needs triton; `__init__.py` imports it when a kernel is about to run."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...index import SparseIndex
from ...intervals import RowIntervals
from ..attended import Attended
from . import kernel as written
from .bound import launch
from .chosen import ChosenIndex
from .config import Config, power_of_two
from .laid import chosen_work
from .work import Work, work_of

kernel: Any = written  # Triton launches its functions with a grid and with options

POOL_ROWS = 32
UNIT = 8  # strides are passed in units of so many elements
Units = tuple[int, int, int]  # of batch, heads and tokens


class Call(NamedTuple):
    """What a call's kernels read and write.

    Args:
        q, k, v: `[B, H, N, D]`, as `readable` makes them.
        out: As q, unwritten.
        lse: float32 `[B, H, N]`, unwritten.
        sparse_index, rows: `index` and `rows` of `forward`.
        scale: Factor of the logits, positive.
        of_q, of_k, of_v, of_out: Strides of these, in units.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    sparse_index: SparseIndex | ChosenIndex
    rows: RowIntervals | None
    scale: float
    of_q: Units
    of_k: Units
    of_v: Units
    of_out: Units


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex | ChosenIndex,
    rows: RowIntervals | None,
    scale: float,
    configs: tuple[Config, Config],
) -> Attended:
    """Attention and its LSE, `[B, H, N, D]` and float32 `[B, H, N]`."""
    call = call_of(q, k, v, index, rows, scale)
    attend(call, _work(index, call.k, *configs, intervals=rows is not None))
    return Attended(call.out, call.lse)


def call_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex | ChosenIndex,
    rows: RowIntervals | None,
    scale: float,
) -> Call:
    """A call as its kernels take it; arguments as of `forward`."""
    q, scale = _positive(q, scale)
    (q, of_q), (k, of_k), (v, of_v) = readable(q), readable(k), readable(v)
    batch, heads, queries, _ = q.shape
    out = torch.empty_like(q)
    of_out = _units(out)
    if of_out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        of_out = _whole_units(out)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    return Call(q, k, v, out, lse, index, rows, scale, of_q, of_k, of_v, of_out)


def attend(call: Call, work: Work) -> None:
    """Write what heads and tiles of `work` compute into a call's output and LSE."""
    q, k, v, out, lse, index, rows, scale, of_q, of_k, of_v, of_out = call
    batch, heads, queries, dim = q.shape
    has_far = work.pooled_rows > 0
    pooled = pool(call, work) if has_far else (k, work.order)  # else unread
    bounds, strides = bounds_of(index, rows, lse)
    config, mask = work.config, mask_of(index, rows)
    launch(
        kernel, "attend", (work.order.shape[0], batch, 1),
        (q.dtype, config, *map(aligned, bounds)),
        {"num_warps": config.warps, "num_stages": config.stages},
        (q, k, v, out, lse, *pooled, *bounds, work.order, work.heads),
        (*of_q, *of_k, *of_v, *of_out, *strides, heads, heads // k.shape[1], queries, work.pooled_rows),
        scale / math.log(2),
        (dim, *config.channels(dim), config.block_m, config.block_n, mask, has_far,
         mask == 0 or config.masked_ahead, work.partial),
    )  # fmt: skip


def block_mass(
    q: Tensor,
    k: Tensor,
    index: SparseIndex | ChosenIndex,
    lse: Tensor,
    rows: RowIntervals | None,
    scale: float,
    mass_block: int,
    config: Config,
) -> Tensor:
    """Mass from an LSE, float32 `[B, H, G, ceil(M / mass_block)]`."""
    batch, heads, queries, dim = q.shape
    work = _work(index, k, config, config, by_group=True)
    q, scale = _positive(q, scale)
    (q, of_q), (k, of_k), lse = readable(q), readable(k), lse.contiguous()
    groups, blocks = index.max_groups, -(-k.shape[2] // mass_block)
    mass = torch.zeros(batch, heads, groups, blocks, dtype=torch.float32, device=q.device)
    bounds, strides = bounds_of(index, rows, lse)
    mask = mask_of(index, rows)
    launch(
        kernel, "mass", (len(work.order), batch, 1),
        (q.dtype, config, *map(aligned, (lse, *bounds))),
        {"num_warps": config.warps, "num_stages": config.stages},
        (q, k, lse, mass, *bounds, work.order, work.heads),
        (*of_q, *of_k, *strides, heads, heads // k.shape[1], queries, groups, mass_block, blocks),
        scale / math.log(2),
        (dim, *config.channels(dim), config.block_m, config.block_n, mask),
    )  # fmt: skip
    return mass


def _work(
    index: SparseIndex | ChosenIndex,
    k: Tensor,
    small: Config,
    large: Config,
    *,
    intervals: bool = False,
    by_group: bool = False,
) -> Work:
    if isinstance(index, ChosenIndex):
        return chosen_work(index, k, small, large, intervals=intervals, by_group=by_group)
    return work_of(index, k.shape[1], small, large, by_group=by_group)


def mask_of(index: SparseIndex | ChosenIndex, rows: RowIntervals | None) -> int:
    """What the kernels call MASK."""
    return 0 if rows is None else 1 if rows is index.rows else 2


def bounds_of(
    index: SparseIndex | ChosenIndex, rows: RowIntervals | None, unused: Tensor
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


class Pools(Protocol):
    """What is pooled, see `slots.py`."""

    @property
    def slots(self) -> Tensor: ...
    @property
    def cells(self) -> int: ...
    @property
    def pooled_rows(self) -> int: ...


def pool(call: Call, work: Pools) -> tuple[Tensor, Tensor]:
    """Pooled keys and values `[2, B, rows, D]`, and int32 `[3, B, rows]` of each; see the kernel `pool`."""
    k, v, rows = call.k, call.v, call.rows
    batch, _, _, dim = k.shape
    pooled = k.new_empty(2, batch, work.pooled_rows, dim)
    cells = torch.empty(3, batch, work.pooled_rows, dtype=torch.int32, device=k.device)
    valid = cells if rows is None else _valid(rows, k, call.q.shape[2])
    launch(
        kernel, "pool", (work.cells + 1, work.slots.shape[0], batch), (k.dtype,), {"num_warps": 1},
        (k, v, pooled, cells, valid, work.slots),
        (*call.of_k, *call.of_v, work.pooled_rows),
        None,
        (dim, power_of_two(dim), POOL_ROWS, rows is not None),
    )  # fmt: skip
    return pooled, cells


def _valid(rows: RowIntervals, k: Tensor, num_queries: int) -> Tensor:
    """The keys that are in some row's interval, int32 `[B, 2]`."""
    valid = rows.valid(k.shape[2], num_queries)
    return valid.int().expand(k.shape[0], 2).contiguous()


def readable(x: Tensor) -> tuple[Tensor, Units]:
    """Itself if the kernels can address it, 16 bytes at a time, else a copy; and its strides."""
    units = _units(x)
    if units is not None and aligned(x):
        return x, units
    x = x.clone(memory_format=torch.contiguous_format)
    return x, _whole_units(x)


def aligned(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0


def _units(x: Tensor) -> Units | None:
    """Strides in units; None if they aren't whole, or a head is too long."""
    b, h, n, d = x.stride()
    if d != 1 or (b | h | n) % UNIT or n * x.shape[2] >= 1 << 31:
        return None
    return b // UNIT, h // UNIT, n // UNIT


def _whole_units(x: Tensor) -> Units:
    units = _units(x)
    assert units is not None, "it is contiguous"
    return units


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The kernel takes the largest product before it scales: the scale must be positive."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
