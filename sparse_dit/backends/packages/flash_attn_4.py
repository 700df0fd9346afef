"""FlashAttention 4 with block lists (flash-attn-4): sm_90, sm_100, sm_110; below, it ignores the lists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...index import SparseIndex
from ...intervals import RowIntervals
from ..attended import Attended
from . import blocks, whole

NAME = "flash_attn_4"
PACKAGE = "flash-attn-4"
CONTRACTS = (
    whole.Contract(
        PACKAGE, "4.0.0b36", "flash_attn/cute/interface.py", "flash_attn_func",
        (
            "q", "k", "v", "qv", "gather_kv_indices", "softmax_scale", "causal", "window_size",
            "learnable_sink", "softcap", "num_splits", "pack_gqa", "deterministic", "score_mod",
            "score_mod_bwd", "mask_mod", "aux_tensors", "aux_scalars", "block_sparse_tensors",
            "block_sparse_tensors_bwd", "return_lse", "gather_bwd_recompute_p",
            "gather_bwd_token_chunk",
        ),
    ),
    whole.Contract(
        PACKAGE, "4.0.0b36", "flash_attn/cute/block_sparsity.py", "BlockSparseTensorsTorch",
        (
            "mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx",
            "cu_total_m_blocks", "cu_block_idx_offsets", "block_size", "dq_write_order",
            "dq_write_order_full", "spt",
        ),
    ),
)  # fmt: skip
HOPPER, BLACKWELL = ((128, 128), (128, 64), (64, 128), (64, 64)), ((256, 128),)  # no fewer rows
BLOCKS = {9: HOPPER, 10: BLACKWELL, 11: BLACKWELL}


def unsupported(q: Tensor, index: SparseIndex) -> str | None:
    """Why FlashAttention 4 can't run this; None if it can."""
    if reason := whole.not_here(q, PACKAGE, (64, 128)):
        return reason
    sizes = BLOCKS.get(whole.capability(q.device)[0])
    if sizes is None:
        return f"it honours block lists on sm_90, sm_100 and sm_110 only, and {q.device} is another"
    return whole.not_whole(index, sizes)


def lacks(q: Tensor, return_lse: bool, mass: bool) -> str | None:
    """Why it can't give the LSE or block mass that is asked for, to follow its name; None if it can."""
    if mass:
        return "it has no block mass"
    return None


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
    """Attention over `[B, H, N, D]`; arguments as in `sparse_attention`.

    Raises:
        NotImplementedError: If rows have intervals, or a result is wanted that it hasn't.
    """
    if reason := lacks(q, return_lse, mass_block is not None):
        raise NotImplementedError(f"backend {NAME!r} cannot run this: {reason}")

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

        out, lse = flash_attn_func(
            *(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, pack_gqa=False,
            block_sparse_tensors=lists(index, q.device), return_lse=return_lse,
        )  # fmt: skip
        return out.transpose(1, 2), lse

    shared = whole.share_keys(index, k.shape[1])
    return whole.run(NAME, q, k, v, index, rows, kernel, shared=shared)


def lists(index: SparseIndex, device: torch.device) -> Any:
    """An index's blocks as the package's own type, for all items of a batch; made once."""
    size = whole.fit(index, BLOCKS[whole.capability(device)[0]])
    assert size is not None, "`unsupported` has looked"

    def make() -> Any:
        from flash_attn.cute.block_sparsity import (  # pyright: ignore[reportMissingImports]
            BlockSparseTensorsTorch,
        )

        counts, listed = (x[None] for x in blocks.block_lists(index, *size))
        return BlockSparseTensorsTorch(
            mask_block_cnt=torch.zeros_like(counts), mask_block_idx=torch.zeros_like(listed[..., :1]),
            full_block_cnt=counts, full_block_idx=listed, block_size=size,
        )  # fmt: skip

    return blocks.kept(index, ("flash_attn_4", size), make)


def block_mass(
    q: Tensor,
    k: Tensor,
    index: SparseIndex,
    lse: Tensor,
    rows: RowIntervals | None,
    scale: float,
    mass_block: int,
) -> Tensor:
    """Raise NotImplementedError: the package gives no block mass."""
    raise whole.no_mass(NAME)
