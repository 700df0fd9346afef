"""NaN or Inf in a sparse head: that head once more, dense. NaN in what a model says: an error."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .backends.sorting import without_padding
from .intervals import RowIntervals

logger = logging.getLogger("sparse_dit")
_told: set[str] = set()


def refuse_nan(model: object, logits: Tensor) -> None:
    """Raise ValueError if any of a language model's logits is NaN, of any shape. Waits for the device."""
    if logits.isnan().any():
        raise ValueError(
            f"what {type(model).__name__} says of tokens must be numbers, got NaN: its weights are "
            "broken, or its dtype is too small; try bfloat16 or float32"
        )


def finite_or_dense(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: RowIntervals | None,
    scale: float | None,
) -> Tensor:
    """Replace the heads of `out` that hold NaN or Inf by dense attention, logged once for a process.

    Waits for the device. If the inputs themselves hold NaN, so does the dense head.

    Args:
        out: `[B, H, N, D]`, written to.
        q, k, v, scale: The arguments of the sparse attention call that returned `out`.
        rows: What its rows might see at all.
    """
    if out.sum((0, 2, 3), dtype=torch.float32).isfinite().all():
        return out  # one pass: NaN or Inf survives any sum
    bad = (~out.isfinite()).any(-1).any(-1).any(0).nonzero()[:, 0].tolist()
    if not bad:
        return out
    mask = None if rows is None else _mask(rows, q.shape[2], k.shape[2])
    k, v = (without_padding(x, rows, q.shape[2]) for x in (k, v))
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


def _mask(rows: RowIntervals, num_queries: int, num_keys: int) -> Tensor:
    """What dense attention may see, bool `[1 or B, 1, N or 1, M]`."""
    start, stop = (x[:, None, :, None] for x in rows.bounds(num_keys, num_queries))
    keys = torch.arange(num_keys, device=start.device)
    return (start <= keys) & (keys < stop)
