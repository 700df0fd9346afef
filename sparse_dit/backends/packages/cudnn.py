"""cuDNN's block-sparse attention (nvidia-cudnn-frontend), sm_90 to sm_120."""

from __future__ import annotations

import torch
from torch import Tensor

from ...index import SparseIndex
from ...intervals import RowIntervals
from ..attended import Attended
from . import whole

NAME = "cudnn"
PACKAGE = "nvidia-cudnn-frontend"
CONTRACTS = (
    whole.Contract(
        PACKAGE, "1.32.0", "cudnn/block_sparse_attention/api.py", "block_sparse_attention_forward",
        (
            "q_tensor", "k_tensor", "v_tensor", "q2k_block_index", "block_sparse_num", "block_sizes",
            "q2k_block_nums", "sparse_block_size", "allow_empty_block_nums", "softmax_scale",
            "pack_gqa", "layout", "kv_splits", "use_clc",
        ),
    ),
)  # fmt: skip
HEAD_DIMS = {9: (64, 96, 128), 10: (64, 96, 128), 11: (64, 96, 128), 12: (128,)}


def unsupported(q: Tensor, index: SparseIndex) -> str | None:
    """Why cuDNN can't run this; None if it can."""
    if reason := whole.not_here(q, PACKAGE, (64, 96, 128)):
        return reason
    major = whole.capability(q.device)[0]
    if q.shape[-1] not in HEAD_DIMS.get(major, ()):
        return (
            f"sm_90 to sm_120 have it, and sm_120 with head_dim 128 only; {q.device} is sm_{major}x"
        )
    reasons = [whole.not_whole(index, block, block) for block in blocks_for(q, index)]
    return None if None in reasons else reasons[0]


def blocks_for(q: Tensor, index: SparseIndex) -> tuple[int, ...]:
    """Sizes of blocks that the architecture has for such a call, the preferred one first."""
    major = whole.capability(q.device)[0]
    if major == 9:
        return (128, 64) if index.num_queries % 64 == 0 else (128,)
    small = major == 12 or (q.shape[-1] == 128 and q.dtype == torch.bfloat16)
    return (128, 64) if small else (128,)


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
        from cudnn.block_sparse_attention.api import (  # pyright: ignore[reportMissingImports]
            block_sparse_attention_forward,
        )

        fits = [b for b in blocks_for(q, index) if whole.not_whole(index, b, b) is None]
        counts, lists = whole.block_lists(index, fits[0], fits[0])
        got = block_sparse_attention_forward(
            q, k, v, lists.expand(len(q), -1, -1, -1).contiguous(),
            q2k_block_nums=counts.expand(len(q), -1, -1).contiguous(),
            sparse_block_size=fits[0], allow_empty_block_nums=True, softmax_scale=scale,
            pack_gqa=False, layout="bhsd",
        )  # fmt: skip
        return got[0], got[1]

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
