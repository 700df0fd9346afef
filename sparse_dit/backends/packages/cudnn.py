"""cuDNN's block-sparse attention (nvidia-cudnn-frontend), sm_90 to sm_120."""

from __future__ import annotations

import torch
from torch import Tensor

from ...index import SparseIndex
from ...intervals import RowIntervals
from ..attended import Attended
from . import blocks, whole

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
    return whole.not_whole(index, sizes(q, index))


def sizes(q: Tensor, index: SparseIndex) -> tuple[tuple[int, int], ...]:
    """Rows and keys of the blocks that the architecture has for such a call, the preferred first."""
    large, small = (128, 128), (64, 64)
    major = whole.capability(q.device)[0]
    if major == 9:
        return (large, small) if index.num_queries % 64 == 0 else (large,)
    every = major == 12 or (q.shape[-1] == 128 and q.dtype == torch.bfloat16)
    return (large, small) if every else (large,)


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

    size = whole.fit(index, sizes(q, index))
    assert size is not None, "`unsupported` has looked"

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        from cudnn.block_sparse_attention.api import (  # pyright: ignore[reportMissingImports]
            block_sparse_attention_forward,
        )

        counts, listed = (
            blocks.for_batch(index, (NAME, size, name), len(q), table)
            for name, table in zip(
                ("counts", "lists"), blocks.block_lists(index, *size), strict=True
            )
        )
        by_token = q.stride(1) < q.stride(2)  # as most hosts lay them out, [B, N, H, D]
        out, lse = block_sparse_attention_forward(
            *(x.transpose(1, 2) if by_token else x for x in (q, k, v)), listed,
            q2k_block_nums=counts, sparse_block_size=size[0], allow_empty_block_nums=True,
            softmax_scale=scale, pack_gqa=False, layout="bshd" if by_token else "bhsd",
        )  # fmt: skip
        return out.transpose(1, 2) if by_token else out, lse

    major = whole.capability(q.device)[0]
    shared = whole.share_keys(index, k.shape[1]) and not (size[0] == 64 and major in (10, 11))
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
