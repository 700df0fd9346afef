"""From tensors to launches. Needs triton; `__init__.py` imports it when a kernel is about to run."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...index import SparseIndex
from ...intervals import RowIntervals
from ..attended import Attended
from ..triton import launch as gathering
from ..triton.bound import launch
from . import kernel as written
from .config import ROWS
from .work import Work, work_of

kernel: Any = written  # Triton launches its functions with a grid and with options

KINDS = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def forward(
    q: Tensor, k: Tensor, v: Tensor, index: SparseIndex, rows: RowIntervals | None, scale: float
) -> Attended:
    """Attention and its LSE, `[B, H, N, D]` and float32 `[B, H, N]`, each head by its kernel."""
    work = work_of(index, k.shape[1], q.shape[-1], masked=rows is not None)
    call = gathering.call_of(q, k, v, index, rows, scale)
    if work.tiles.shape[0]:
        _attend(call, work)
    if work.others is not None:
        gathering.attend(call, work.others)
    return Attended(call.out, call.lse)


def _attend(call: gathering.Call, work: Work) -> None:
    """Write what the heads that the kernel takes compute into a call's output and LSE."""
    q, k, v, out, lse, index, rows, scale, *_, of_out = call
    batch, heads, queries, dim = q.shape
    config, far = work.config, work.pooled_rows > 0
    query_block = block_layout(ROWS, dim, q.dtype)
    key_block = block_layout(config.block_n, dim, q.dtype)
    cells, pooled_blocks = work.steps, None  # never read
    if far:
        pooled, cells = gathering.pool(call, work)
        shape = (2 * batch, 1, work.pooled_rows, dim)  # keys of all items, then values of all
        strides = (work.pooled_rows * dim, dim, dim, 1)
        pooled_blocks = _blocks(pooled, shape, strides, key_block)
    bounds, strides = gathering.bounds_of(index, rows, cells)
    launch(
        kernel, "attend", (work.tiles.shape[0], batch, 1),
        (q.dtype, config, *map(gathering.aligned, bounds)),
        {"num_warps": 4, "maxnreg": config.registers},
        (out, lse, cells, *bounds, work.tiles, work.steps, work.masks,
         _blocks(q, q.shape, q.stride(), query_block),
         _blocks(k, k.shape, k.stride(), key_block),
         _blocks(v, v.shape, v.stride(), key_block),
         pooled_blocks),
        (*of_out, *strides, heads, heads // k.shape[1], queries, work.pooled_rows),
        scale / math.log(2),
        (dim, config.block_n, config.stages, config.consumers, gathering.mask_of(index, rows), far),
    )  # fmt: skip


def _blocks(x: Tensor, shape: Any, strides: Any, block: tuple[list[int], Any]) -> TensorDescriptor:
    """`[batch, heads, tokens, D]` as TMA reads it, so many tokens at a time; those beyond the last are 0.

    What its constructor would check, at each call anew, `readable` made sure of. The zeros are its default.
    """
    blocks = object.__new__(TensorDescriptor)
    blocks.base, blocks.shape, blocks.strides = x, shape, strides
    blocks.block_shape, blocks.layout = block
    return blocks


@functools.cache
def block_layout(rows: int, dim: int, dtype: torch.dtype) -> tuple[list[int], Any]:
    """The shape of a block, and how it lies in shared memory."""
    block = [1, 1, rows, dim]
    return block, gl.NVMMASharedLayout.get_default_for(block, KINDS[dtype])
