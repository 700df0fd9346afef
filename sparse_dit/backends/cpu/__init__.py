"""The native CPU kernel: block-sparse flash attention in C++, for AVX2, AVX-512, NEON or plain.

`csrc/` is the kernel, `library.py` opens it, `packed.py` writes an index as it reads it,
`operator.py` makes torch operators of it. See `docs/kernel.md`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...index import SparseIndex
from ...intervals import RowIntervals
from ..attended import Attended
from . import library, operator
from .packed import packed_index

MAX_HEAD_DIM = 512


def unsupported(q: Tensor, index: SparseIndex) -> str | None:
    """Why the kernel can't run this; None if it can."""
    if not q.is_cpu:
        return f"it runs on the CPU, but q is on {q.device}"
    if q.dtype not in operator.DTYPES:
        return f"it takes float32, bfloat16 and float16, but q is {q.dtype}"
    return unsupported_values(q.shape[-1]) or library.PROBLEM


def unsupported_values(width: int) -> str | None:
    """Why the kernel can't have so many channels; None if it can. v may have others than q and k."""
    if width % 8 or not 0 < width <= MAX_HEAD_DIM:
        return f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {width}"
    return None


def _bounds(rows: RowIntervals | None, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Where the rows' keys start and stop, `[B, N]`."""
    if rows is None:
        return None, None
    shape = (q.shape[0], q.shape[2])
    start, stop = (None if x is None else x.expand(shape) for x in (rows.start, rows.stop))
    return start, stop


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    rows: RowIntervals | None,
    scale: float,
    return_lse: bool,
    mass_block: int | None,
) -> Attended:
    """Attention over `[B, H, N, D]`; arguments as in `sparse_attention`."""
    words = packed_index(index)
    if not return_lse and not mass_block:
        return Attended(torch.ops.sparse_dit.attend(q, k, v, words, *_bounds(rows, q), scale))
    groups = index.max_groups if mass_block else 0
    out, lse, mass = torch.ops.sparse_dit.attend_measured(
        q, k, v, words, *_bounds(rows, q), scale, return_lse, mass_block or 0, groups
    )
    return Attended(out, lse if return_lse else None, mass if mass_block else None)


def block_mass(
    q: Tensor,
    k: Tensor,
    index: SparseIndex,
    lse: Tensor,
    rows: RowIntervals | None,
    scale: float,
    mass_block: int,
) -> Tensor:
    """Exact mass from a cached LSE; arguments as in `sparse_dit.attention.block_mass`."""
    return torch.ops.sparse_dit.block_mass(
        q, k, packed_index(index), lse, *_bounds(rows, q), scale, mass_block, index.max_groups
    )
