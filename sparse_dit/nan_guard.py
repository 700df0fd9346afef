"""NaN or Inf in a sparse head: that head once more, dense."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .backends.sorting import without_padding
from .index import SparseIndex

logger = logging.getLogger("sparse_dit")
_told: set[str] = set()


def finite_or_dense(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    kv_len: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Replace the heads of `out` that hold NaN or Inf by dense attention, logged once for a process.

    Waits for the device. If the inputs themselves hold NaN, so does the dense head.

    Args:
        out: `[B, H, N, D]`, written to.
        q, k, v, index, kv_len, scale: The arguments of the sparse attention call that returned `out`.
    """
    if out.sum((0, 2, 3), dtype=torch.float32).isfinite().all():
        return out  # one pass: NaN or Inf survives any sum
    bad = (~out.isfinite()).any(-1).any(-1).any(0).nonzero()[:, 0].tolist()
    if not bad:
        return out
    mask = _mask(index, kv_len, q.device)
    k, v = (without_padding(x, kv_len) for x in (k, v))
    repeat = q.shape[1] // k.shape[1]
    for head in bad:
        one = slice(head, head + 1)
        of_keys = slice(head // repeat, head // repeat + 1)
        dense = scaled_dot_product_attention(
            q[:, one], k[:, of_keys], v[:, of_keys], attn_mask=mask, scale=scale
        )
        if mask is not None:
            dense = dense.masked_fill(~mask.any(-1, keepdim=True), 0.0)
        out[:, one] = dense
    if "told" not in _told:
        _told.add("told")
        logger.warning(
            "sparse attention gave NaN or Inf in heads %s; such heads are computed dense instead "
            "(said once)", bad,
        )  # fmt: skip
    return out


def _mask(index: SparseIndex, kv_len: Tensor | None, device: torch.device) -> Tensor | None:
    """What dense attention may see, bool `[B or 1, 1, N or 1, M]`; None if everything."""
    keys = torch.arange(index.num_keys, device=device)
    mask = None
    if kv_len is not None:
        mask = (keys < kv_len.to(device)[:, None])[:, None, None]
    if index.causal:
        rows = torch.arange(index.num_queries, device=device) + index.causal_offset
        order = (keys <= rows[:, None])[None, None]
        mask = order if mask is None else mask & order
    return mask
