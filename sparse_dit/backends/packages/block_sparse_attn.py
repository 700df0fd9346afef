"""MIT's Block-Sparse-Attention (block_sparse_attn), blocks of 128, sm_80 and later."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from ...index import SparseIndex
from ...intervals import RowIntervals
from ..attended import Attended
from . import blocks, whole

NAME = "block_sparse_attn"
PACKAGE = "block_sparse_attn"
FUNCTION = "block_sparse_attn_func"
CONTRACTS = (
    whole.Contract(
        PACKAGE, "0.0.2", "block_sparse_attn/block_sparse_attn_interface.py",
        FUNCTION,
        (
            "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "head_mask_type", "streaming_info",
            "base_blockmask", "max_seqlen_q_", "max_seqlen_k_", "p_dropout", "deterministic",
            "softmax_scale", "is_causal", "exact_streaming", "return_attn_probs",
        ),
    ),
)  # fmt: skip
BLOCK = 128


def unsupported(q: Tensor, index: SparseIndex) -> str | None:
    """Why Block-Sparse-Attention can't run this; None if it can."""
    if reason := whole.not_here(q, PACKAGE, (32, 64, 128)):
        return reason
    if whole.capability(q.device) < (8, 0):
        return f"it needs sm_80 or later, and {q.device} is older"
    return whole.not_whole(index, [(BLOCK, BLOCK)])


def starts(batch: int, tokens: int, like: Tensor) -> Tensor:
    """Where the sequences of a batch start, int32 `[batch + 1]`."""
    return torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=like.device)


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
        import block_sparse_attn

        attention = getattr(
            block_sparse_attn, FUNCTION
        )  # a checker takes this file for the package
        batch, heads, n, _ = q.shape
        seen = blocks.block_map(index, BLOCK, BLOCK)
        seen = blocks.for_batch(index, (NAME,), batch, seen)
        flat = [rearrange(x, "batch heads n dim -> (batch n) heads dim") for x in (q, k, v)]
        every = torch.ones(heads, dtype=torch.int32, device=q.device)  # each head has a block mask
        out, lse, _ = attention(
            *flat, starts(batch, n, q), starts(batch, k.shape[2], q), every, None, seen, n, k.shape[2],
            0.0, softmax_scale=scale, is_causal=False, return_attn_probs=True,
        )  # fmt: skip
        out = rearrange(out, "(batch n) heads dim -> batch heads n dim", batch=batch)
        return out, lse.masked_fill(lse.isinf(), -torch.inf)  # it has +inf where nothing is seen

    shared = whole.share_keys(index, k.shape[1])
    got = whole.run(NAME, q, k, v, index, rows, kernel, shared=shared)
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
