"""From tensors to launches. Needs triton; `__init__.py` imports it when a kernel is about to run."""

from __future__ import annotations

import functools
import math
from typing import Any, Protocol

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
    work = _work(index, k, *configs, intervals=rows is not None)
    q, k, v = readable(q), readable(k), readable(v)
    q, scale = positive(q, scale)
    got = results(q)
    attend_into(got, q, k, v, index, rows, scale, work)
    return Attended(*got)


def results(q: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the output and the LSE of `q`, which is readable."""
    out = torch.empty_like(q)
    if _strides(out) is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def attend_into(
    into: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex | ChosenIndex,
    rows: RowIntervals | None,
    scale: float,
    work: Work,
) -> None:
    """Write what heads and tiles of `work` compute into an output and an LSE.

    Args:
        into: As `results` gives them.
        q, k, v: As made by `readable`.
        index, rows: As for `forward`.
        scale: Factor of the logits, positive.
        work: The work of the index.
    """
    batch, heads, queries, dim = q.shape
    out, lse = into
    pooled = (
        (k, work.order) if not work.pooled_rows else pool(k, v, work, rows, queries)
    )  # else unread
    bounds, strides = bounds_of(index, rows, lse)
    config = work.config
    mask, has_far = mask_of(index, rows), work.pooled_rows > 0
    launch(
        kernel, "attend", (len(work.order), batch, 1),
        (q.dtype, config, *map(aligned, bounds)),
        {"num_warps": config.warps, "num_stages": config.stages},
        (q, k, v, out, lse, *pooled, *bounds, work.order, work.heads),
        (*units(q), *units(k), *units(v), *units(out), *strides,
         heads, heads // k.shape[1], queries, work.pooled_rows),
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
    q, k, lse = readable(q), readable(k), lse.contiguous()
    q, scale = positive(q, scale)
    groups, blocks = index.max_groups, -(-k.shape[2] // mass_block)
    mass = torch.zeros(batch, heads, groups, blocks, dtype=torch.float32, device=q.device)
    bounds, strides = bounds_of(index, rows, lse)
    mask = mask_of(index, rows)
    launch(
        kernel, "mass", (len(work.order), batch, 1),
        (q.dtype, config, *map(aligned, (lse, *bounds))),
        {"num_warps": config.warps, "num_stages": config.stages},
        (q, k, lse, mass, *bounds, work.order, work.heads),
        (*units(q), *units(k), *strides,
         heads, heads // k.shape[1], queries, groups, mass_block, blocks),
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


def pool(
    k: Tensor, v: Tensor, work: Pools, rows: RowIntervals | None, num_queries: int
) -> tuple[Tensor, Tensor]:
    """Pooled keys and values `[2, B, rows, D]`, and int32 `[3, B, rows]` of each; see the kernel `pool`."""
    batch, _, _, dim = k.shape
    pooled = k.new_empty(2, batch, work.pooled_rows, dim)
    cells = torch.empty(3, batch, work.pooled_rows, dtype=torch.int32, device=k.device)
    valid = cells if rows is None else _valid(rows, k, num_queries)
    masked = rows is not None
    launch(
        kernel, "pool", (work.cells + 1, len(work.slots), batch), (k.dtype,), {"num_warps": 1},
        (k, v, pooled, cells, valid, work.slots),
        (*units(k), *units(v), work.pooled_rows),
        None,
        (dim, power_of_two(dim), POOL_ROWS, masked),
    )  # fmt: skip
    return pooled, cells


def _valid(rows: RowIntervals, k: Tensor, num_queries: int) -> Tensor:
    """The keys that are in some row's interval, int32 `[B, 2]`."""
    valid = rows.valid(k.shape[2], num_queries)
    return valid.int().expand(k.shape[0], 2).contiguous()


def readable(x: Tensor) -> Tensor:
    """Itself if the kernels can address it, 16 bytes at a time, else a copy."""
    if _strides(x) is not None and aligned(x):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def aligned(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0


def _strides(x: Tensor) -> tuple[int, int, int] | None:
    """Strides of batch, heads and tokens in units; None if they aren't whole, or a head is too long."""
    b, h, n, d = x.stride()
    if d != 1 or b % UNIT or h % UNIT or n % UNIT or n * x.shape[2] >= 1 << 31:
        return None
    return b // UNIT, h // UNIT, n // UNIT


def units(x: Tensor) -> tuple[int, int, int]:
    units = _strides(x)
    assert units is not None, "what is read was made readable"
    return units


def positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The kernel takes the largest product before it scales: the scale must be positive."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
