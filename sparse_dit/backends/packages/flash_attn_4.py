"""FlashAttention 4 with block lists (flash-attn-4): sm_90 and sm_100; below, it ignores the lists."""

from __future__ import annotations

import torch
from torch import Tensor

from ...index import SparseIndex
from ...intervals import RowIntervals
from ..attended import Attended
from . import whole

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
BLOCKS = {9: (128, 128), 10: (256, 128)}  # sm_100 refuses 128 rows


def unsupported(q: Tensor, index: SparseIndex) -> str | None:
    """Why FlashAttention 4 can't run this; None if it can."""
    if reason := whole.not_here(q, PACKAGE, (64, 128)):
        return reason
    block = BLOCKS.get(whole.capability(q.device)[0])
    if block is None:
        return f"it honours block lists on sm_90 and sm_100 only, and {q.device} is another"
    return whole.not_whole(index, *block)


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
        from flash_attn.cute.block_sparsity import (  # pyright: ignore[reportMissingImports]
            BlockSparseTensorsTorch,
        )

        block = BLOCKS[whole.capability(q.device)[0]]
        counts, lists = (x[None].expand(len(q), *x.shape) for x in whole.block_lists(index, *block))
        tensors = BlockSparseTensorsTorch(
            mask_block_cnt=torch.zeros_like(counts), mask_block_idx=torch.zeros_like(lists),
            full_block_cnt=counts.contiguous(), full_block_idx=lists.contiguous(), block_size=block,
        )  # fmt: skip
        out, lse = flash_attn_func(
            *(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, block_sparse_tensors=tensors,
            return_lse=True,
        )  # fmt: skip
        return out.transpose(1, 2), lse

    got = whole.run(NAME, q, k, v, index, rows, kernel)
    return got if return_lse else got._replace(lse=None)


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
