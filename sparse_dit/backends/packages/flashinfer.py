"""flashinfer's attention over blocks of any size (flashinfer-python), sm_80 and later."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...index import SparseIndex
from ...intervals import RowIntervals
from ..attended import Attended
from . import whole

NAME = "flashinfer"
PACKAGE = "flashinfer-python"
FILE, WRAPPER = "flashinfer/sparse.py", "VariableBlockSparseAttentionWrapper"
CONTRACTS = (
    whole.Contract(
        PACKAGE, "0.7.2.post1", FILE, f"{WRAPPER}.__init__", ("float_workspace_buffer", "backend")
    ),
    whole.Contract(
        PACKAGE, "0.7.2.post1", FILE, f"{WRAPPER}.plan",
        (
            "block_mask_map", "block_row_sz", "block_col_sz", "num_qo_heads", "num_kv_heads",
            "head_dim", "causal", "pos_encoding_mode", "use_fp16_qk_reduction", "logits_soft_cap",
            "sm_scale", "rope_scale", "rope_theta", "non_blocking", "q_data_type", "kv_data_type",
        ),
    ),
    whole.Contract(
        PACKAGE, "0.7.2.post1", FILE, f"{WRAPPER}.run",
        ("q", "k", "v", "out", "lse", "return_lse", "enable_pdl"),
    ),
)  # fmt: skip
BLOCK = 64
WORKSPACE = 128 << 20  # bytes, as it recommends
MOST_LISTED = 1 << 28  # keys: it writes every block out to tokens, 4 bytes each
MOST_ROWS = 32768  # blocks of rows of all heads: the length of its buffer


def unsupported(q: Tensor, index: SparseIndex) -> str | None:
    """Why flashinfer can't run this; None if it can."""
    if reason := whole.not_here(q, PACKAGE, (64, 128, 256)):
        return reason
    if whole.capability(q.device) < (8, 0):
        return f"it needs sm_80 or later, and {q.device} is older"
    return whole.not_whole(index, BLOCK, BLOCK) or too_long(index)


def too_long(index: SparseIndex) -> str | None:
    """Why its token lists would be too long; None if they wouldn't."""
    counts, _ = whole.block_lists(index, BLOCK, BLOCK)
    if counts.numel() > MOST_ROWS:
        return f"it has room for {MOST_ROWS} blocks of rows, the index has {counts.numel()}"
    listed = int(counts.sum()) * BLOCK
    if listed > MOST_LISTED:
        return f"it writes lists out to tokens, which would take {listed * 4 / 2**30:.1f} GiB"
    return None


def sizes(tokens: int, heads: int) -> Tensor:
    """Tokens of each block, int32 `[heads, blocks]`."""
    bounds = torch.arange(0, tokens + BLOCK, BLOCK, device="cpu").clamp_max(tokens)
    return bounds.diff().int().expand(heads, -1).contiguous()


def planned(q: Tensor, index: SparseIndex, scale: float) -> Any:
    """A wrapper that has the lists, kept in the index's cache."""
    import flashinfer

    key = ("flashinfer", q.dtype, q.shape[-1], scale)
    if key not in index.cache:
        heads, dim = q.shape[1], q.shape[-1]
        space = torch.empty(WORKSPACE, dtype=torch.uint8, device=q.device)
        make = getattr(flashinfer, WRAPPER)  # a checker finds this very file under the name
        wrapper = make(space, backend="auto")
        wrapper.plan(
            whole.block_map(index, BLOCK, BLOCK), sizes(q.shape[2], heads).to(q.device),
            sizes(index.num_keys, heads).to(q.device), heads, heads, dim, sm_scale=scale,
            q_data_type=q.dtype,
        )  # fmt: skip
        index.cache[key] = wrapper
    return index.cache[key]


def lacks(q: Tensor, return_lse: bool, mass: bool) -> str | None:
    """Why it can't give the LSE or block mass that is asked for, to follow its name; None if it can."""
    if mass:
        return "it has no block mass"
    return "its log-sum-exp has another base, and isn't used" if return_lse else None


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
        wrapper = planned(q, index, scale)
        return torch.stack([wrapper.run(*one) for one in zip(q, k, v, strict=True)]), None

    return whole.run(NAME, q, k, v, index, rows, kernel)


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
