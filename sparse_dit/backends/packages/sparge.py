"""SpargeAttn's block-sparse SageAttention 2 (spas_sage_attn): 8-bit products, so it rounds on purpose."""

from __future__ import annotations

import torch
from torch import Tensor

from ...index import SparseIndex
from ...intervals import RowIntervals
from ..attended import Attended
from . import blocks, whole

NAME = "sparge"
PACKAGE = "spas_sage_attn"
TOLERANCE = 0.1  # relative error of a head that 8 bits may have
CONTRACTS = (
    whole.Contract(
        PACKAGE, "0.1.0", "spas_sage_attn/core.py", "block_sparse_sage2_attn_cuda",
        (
            "q", "k", "v", "mask_id", "dropout_p", "scale", "smooth_k", "pvthreshd",
            "attention_sink", "tensor_layout", "output_dtype", "return_sparsity",
        ),
    ),
)  # fmt: skip
LEAST_TOKENS = 128


def block(device: torch.device) -> tuple[int, int]:
    """Rows and keys of its blocks."""
    return (64, 128) if whole.capability(device) == (9, 0) else (128, 64)


def unsupported(q: Tensor, index: SparseIndex) -> str | None:
    """Why SpargeAttn can't run this; None if it can."""
    if reason := whole.not_here(q, PACKAGE, (64, 128)):
        return reason
    if whole.capability(q.device) < (8, 0):
        return f"it needs sm_80 or later, and {q.device} is older"
    if index.num_queries < LEAST_TOKENS:
        return f"it needs at least {LEAST_TOKENS} tokens, got {index.num_queries}"
    return whole.not_whole(index, [block(q.device)])


def lacks(q: Tensor, return_lse: bool, mass: bool) -> str | None:
    """Why it can't give the LSE or block mass that is asked for, to follow its name; None if it can."""
    if mass:
        return "it has no block mass"
    return "it gives no log-sum-exp" if return_lse else None


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
        from spas_sage_attn.core import (  # pyright: ignore[reportMissingImports]
            block_sparse_sage2_attn_cuda,
        )

        seen = blocks.block_map(index, *block(q.device))
        mask = blocks.for_batch(index, (NAME, block(q.device)), len(q), seen).view(torch.int8)
        return block_sparse_sage2_attn_cuda(q, k, v, mask_id=mask, scale=scale), None

    shared = whole.share_keys(index, k.shape[1])
    return whole.run(NAME, q, k, v, index, rows, kernel, shared=shared)


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
