"""flashinfer's block-sparse attention (flashinfer-python), sm_80 and later.

On data-centre Blackwell at head_dim 128 its routes take the lists as they are, with a pooled key for every
block that isn't seen (`flashinfer_routes.py`). Elsewhere it writes lists out to tokens.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...index import SparseIndex
from ...intervals import RowIntervals
from ..attended import Attended
from . import blocks, flashinfer_routes, whole

NAME = "flashinfer"
PACKAGE, VERSION = flashinfer_routes.PACKAGE, flashinfer_routes.VERSION
FILE, WRAPPER = "flashinfer/sparse.py", "VariableBlockSparseAttentionWrapper"
CONTRACTS = (
    whole.Contract(
        PACKAGE, VERSION, FILE, f"{WRAPPER}.__init__", ("float_workspace_buffer", "backend")
    ),
    whole.Contract(
        PACKAGE, VERSION, FILE, f"{WRAPPER}.plan",
        (
            "block_mask_map", "block_row_sz", "block_col_sz", "num_qo_heads", "num_kv_heads",
            "head_dim", "causal", "pos_encoding_mode", "use_fp16_qk_reduction", "logits_soft_cap",
            "sm_scale", "rope_scale", "rope_theta", "non_blocking", "q_data_type", "kv_data_type",
            "q_scale", "k_scale", "v_scale",
        ),
    ),
    whole.Contract(
        PACKAGE, VERSION, FILE, f"{WRAPPER}.run",
        ("q", "k", "v", "out", "lse", "return_lse", "enable_pdl"),
    ),
    *flashinfer_routes.CONTRACTS,
)  # fmt: skip
BLOCK = 64
WORKSPACE = 128 << 20  # bytes, as it recommends
MOST_LISTED = 1 << 28  # keys: it writes every block out to tokens, 4 bytes each


def unsupported(q: Tensor, index: SparseIndex) -> str | None:
    """Why flashinfer can't run this; None if it can."""
    if reason := whole.not_here(q, PACKAGE, (64, 128, 256)):
        return reason
    if whole.capability(q.device) < (8, 0):
        return f"it needs sm_80 or later, and {q.device} is older"
    if flashinfer_routes.here(q):
        return whole.not_whole(index, flashinfer_routes.SIZES, far=True)
    return whole.not_whole(index, [(BLOCK, BLOCK)]) or too_long(index)


def too_long(index: SparseIndex) -> str | None:
    """Why its token lists would be too long; None if they wouldn't."""

    def make() -> int:
        return int(blocks.block_lists(index, BLOCK, BLOCK)[0].sum()) * BLOCK

    listed = blocks.kept(index, ("tokens that flashinfer lists",), make)
    if listed > MOST_LISTED:
        return f"it writes lists out to tokens, which would take {listed * 4 / 2**30:.1f} GiB"
    return None


def sizes(tokens: int, heads: int) -> Tensor:
    """Tokens of each block, int32 `[heads, blocks]`."""
    bounds = torch.arange(0, tokens + BLOCK, BLOCK, device="cpu").clamp_max(tokens)
    return bounds.diff().int().expand(heads, -1).contiguous()


@functools.lru_cache(maxsize=8)
def workspace(device: torch.device, stream: int) -> Tensor:
    """Room for partial results, shared by all calls of one stream."""
    return torch.empty(WORKSPACE, dtype=torch.uint8, device=device)


def planned(q: Tensor, key_heads: int, index: SparseIndex, scale: float) -> Any:
    """A wrapper that has the lists, kept in the index's cache."""
    heads, dim = q.shape[1], q.shape[-1]
    stream = flashinfer_routes.stream(q.device)

    def make() -> Any:
        import flashinfer

        make = getattr(flashinfer, WRAPPER)  # a checker finds this very file under the name
        wrapper = make(workspace(q.device, stream), backend="auto")
        seen = blocks.block_map(index, BLOCK, BLOCK)[:: heads // key_heads].contiguous()
        wrapper.plan(
            seen, sizes(q.shape[2], key_heads).to(q.device),
            sizes(index.num_keys, key_heads).to(q.device), heads, key_heads, dim, sm_scale=scale,
            q_data_type=q.dtype,
        )  # fmt: skip
        return wrapper

    return blocks.kept(index, (NAME, q.dtype, dim, key_heads, scale, stream), make)


def lacks(q: Tensor, return_lse: bool, mass: bool) -> str | None:
    """Why it can't give the LSE or block mass that is asked for, to follow its name; None if it can."""
    if mass:
        return "it has no block mass"
    if return_lse and flashinfer_routes.here(q):
        return "its routes on Blackwell give no log-sum-exp"
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
        if flashinfer_routes.here(q):
            return flashinfer_routes.attention(q, k, v, index, scale), None
        wrapper = planned(q, k.shape[1], index, scale)
        items = [wrapper.run(*one, return_lse=return_lse) for one in zip(q, k, v, strict=True)]
        if not return_lse:
            return torch.stack(items), None
        out, lse = (torch.stack(x) for x in zip(*items, strict=True))
        return out, lse * math.log(2)  # it sums powers of 2

    shared = whole.share_keys(index, k.shape[1], blocks=True)
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
