"""`sparse_attention`: checks, picks a backend, calls it."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .backends import gather, reference
from .backends.attended import Attended
from .index import SparseIndex

BACKENDS: dict[str, ModuleType] = {"gather": gather, "reference": reference}
AUTO = ("gather",)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    *,
    kv_len: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention that computes what `index` says; see `attend` for the arguments and errors.

    Returns:
        `[B, H, N, D]`, dtype of `q`; rows that see nothing are 0.
    """
    return attend(q, k, v, index, kv_len=kv_len, scale=scale, backend=backend).out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    *,
    kv_len: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    mass_block: int | None = None,
) -> Attended:
    """Attention with log-sum-exp and block mass on request.

    Inference only. NaN or Inf in the inputs shows in the rows that see it, as in dense attention.

    Args:
        q: `[B, H, N, D]`, any strides.
        k, v: `[B, num_kv_heads, M, D]`, any strides; H must be a multiple of `num_kv_heads`.
        index: Made for H heads, N queries and M keys; moved to the device of `q` by the caller.
        kv_len: int `[B]`, keys from here on are padding; None if there is none.
        scale: Factor of the logits; `head_dim ** -0.5` if None.
        backend: `"auto"` or a name in `BACKENDS`. A named backend runs or raises, it never falls back.
        return_lse: Fill `Attended.lse`.
        mass_block: Fill `Attended.mass`, in blocks of this many sorted keys.

    Raises:
        ValueError: If shapes, dtypes or devices don't fit together, or the backend is unknown.
        NotImplementedError: If the named backend can't run this, with the reason.
    """
    _check(q, k, v, index, kv_len)
    if mass_block is not None and mass_block < 1:
        raise ValueError(f"mass_block must be >= 1, got {mass_block}")
    module = _pick(q, index, backend)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    with torch.no_grad():
        return module.forward(q, k, v, index, kv_len, scale, return_lse, mass_block)


def _pick(q: Tensor, index: SparseIndex, backend: str) -> ModuleType:
    if backend == "auto":
        return next(BACKENDS[n] for n in AUTO if BACKENDS[n].unsupported(q, index) is None)
    if backend not in BACKENDS:
        raise ValueError(
            f"unknown backend {backend!r}; expected 'auto' or one of {sorted(BACKENDS)}"
        )
    if reason := BACKENDS[backend].unsupported(q, index):
        raise NotImplementedError(f"backend {backend!r} cannot run this: {reason}")
    return BACKENDS[backend]


def _check(q: Tensor, k: Tensor, v: Tensor, index: SparseIndex, kv_len: Tensor | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(f"q must be [B, H, N, D] and k, v [B, num_kv_heads, M, D], got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in B and D")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k, v must share a floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device == index.entries[0].q_offsets.device:
        raise ValueError(
            f"q, k, v and the index must be on one device, got {q.device}, {k.device}, {v.device}, "
            f"{index.entries[0].q_offsets.device}; use index.to(q.device)"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} heads must be a multiple of {k.shape[1]} key heads")
    want = (index.num_heads, index.num_queries, index.num_keys)
    if (q.shape[1], q.shape[2], k.shape[2]) != want:
        raise ValueError(
            f"the index is for {want} heads, queries and keys, got "
            f"{(q.shape[1], q.shape[2], k.shape[2])}; build it for this layout"
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("sparse attention is for inference; call it under torch.no_grad()")
    if kv_len is not None:
        if kv_len.shape != q.shape[:1] or kv_len.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"kv_len must be int [{q.shape[0]}], got {kv_len.dtype} {list(kv_len.shape)}"
            )
        if kv_len.device.type == "cpu" and not 0 <= kv_len.min() <= kv_len.max() <= k.shape[2]:
            raise ValueError(f"kv_len must lie in 0 to {k.shape[2]}, got {kv_len.tolist()}")
