"""`sparse_attention`: checks, picks a backend, calls it."""

from __future__ import annotations

import logging
from types import ModuleType

import torch
from torch import Tensor

from .autocast import lowered, without_autocast
from .backends import cpu, flex, gather, gluon, reference, triton
from .backends.attended import Attended
from .backends.packages import block_sparse_attn, cudnn, flash_attn_4, flashinfer, sparge
from .backends.selfcheck import verdict
from .index import SparseIndex
from .intervals import RowIntervals
from .nan_guard import finite_or_dense

logger = logging.getLogger("sparse_dit")

BACKENDS: dict[str, ModuleType] = {
    "cpu": cpu,
    "triton": triton,
    "gluon": gluon,
    "flex": flex,
    "gather": gather,
    "reference": reference,
    "cudnn": cudnn,
    "flash_attn_4": flash_attn_4,
    "flashinfer": flashinfer,
    "sparge": sparge,
    "block_sparse_attn": block_sparse_attn,
}
AUTO = ("cpu", "triton", "flex", "gather")  # the first that can; gluon joins once timed on a GPU
AUTO_DEVICES = {"flex": ("cuda",)}  # where it is taken unasked; on CPUs a size compiles for seconds
TESTED_DEVICES = ("cpu", "meta")  # on others a backend is checked before its first use
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    *,
    row_start: Tensor | None = None,
    row_stop: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    nan_guard: bool = False,
) -> Tensor:
    """Attention over the query-key pairs that `index` names, for inference; see `docs/contract.md`.

    NaN or Inf in the inputs shows in the rows that see it, as in dense attention, and in no others.

    Args:
        q: `[B, H, N, D]`, any strides.
        k, v: `[B, num_kv_heads, M, D]`, any strides; H must be a multiple of `num_kv_heads`. v may be of
            another width than k, where the backend takes that.
        index: The index of H heads, N queries and M keys, on the device of `q`; see `build_index`.
        row_start, row_stop: int32 `[B, N]`, any strides: row n of batch item b sees key tokens
            `row_start[b, n] <= key < row_stop[b, n]` of what the index lists; None for 0 and M. They meet
            with the index's own `rows`. See `sparse_dit.intervals`.
        scale: Factor of the logits; `head_dim ** -0.5` if None.
        backend: `"auto"` or a name in `BACKENDS`. A named backend runs or raises, it never falls back.
        nan_guard: Compute heads that come out with NaN or Inf dense instead, logged once. It costs a wait
            for the device and can't be compiled.

    Returns:
        `[B, H, N, D]`, as wide as v, in the dtype of `q` (or of `torch.autocast`); rows that see
        nothing are 0.

    Raises:
        ValueError: If shapes, dtypes or devices don't fit together, or the backend is unknown.
        NotImplementedError: If the named backend can't run this, with the reason.
    """
    out = attend(
        q, k, v, index, row_start=row_start, row_stop=row_stop, scale=scale, backend=backend
    ).out
    if not nan_guard:
        return out
    rows = _rows(q, index, RowIntervals(row_start, row_stop))
    return finite_or_dense(out, q, k, v, rows, scale)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    *,
    row_start: Tensor | None = None,
    row_stop: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    mass_block: int | None = None,
) -> Attended:
    """Attention with log-sum-exp and block mass on request.

    Inference only. NaN or Inf in the inputs shows in the rows that see it, as in dense attention, and in no
    others. `torch.autocast` casts q, k and v, as for PyTorch's attention. See `docs/contract.md`.

    Args:
        q: `[B, H, N, D]`, any strides.
        k, v: `[B, num_kv_heads, M, D]`, any strides; H must be a multiple of `num_kv_heads`. v may be of
            another width than k, where the backend takes that.
        index: Made for H heads, N queries and M keys; moved to the device of `q` by the caller.
        row_start, row_stop: int32 `[B, N]`, any strides: row n of batch item b sees key tokens
            `row_start[b, n] <= key < row_stop[b, n]` of what the index lists; None for 0 and M. They meet
            with the index's own `rows`. See `sparse_dit.intervals`.
        scale: Factor of the logits; `head_dim ** -0.5` if None.
        backend: `"auto"` or a name in `BACKENDS`. A named backend runs or raises, it never falls back.
        return_lse: Fill `Attended.lse`.
        mass_block: Fill `Attended.mass`, in blocks of this many sorted keys.

    Raises:
        ValueError: If shapes, dtypes or devices don't fit together, or the backend is unknown.
        NotImplementedError: If the named backend can't run this, with the reason.
    """
    rows = RowIntervals(row_start, row_stop)
    return attend_by(backend, q, k, v, index, rows, scale, return_lse, mass_block)[1]


def attend_by(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    rows: RowIntervals,
    scale: float | None = None,
    return_lse: bool = False,
    mass_block: int | None = None,
) -> tuple[str, Attended]:
    """As `attend`, and the name of the backend that ran."""
    q, k, v = lowered(q, k, v)
    _check(q, k, v, index)
    meet = _rows(q, index, rows)
    if mass_block is not None and mass_block < 1:
        raise ValueError(f"mass_block must be >= 1, got {mass_block}")
    width = v.shape[-1]
    name = _name(q, index, backend, return_lse, mass_block is not None, width)
    if q.shape[0] == 0:
        return name, _nothing(q, v, index, return_lse, mass_block)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    with without_autocast(q.device.type):
        found = BACKENDS[name].forward(q, k, v, index, meet, scale, return_lse, mass_block)
    return name, found


def block_mass(
    q: Tensor,
    k: Tensor,
    index: SparseIndex,
    lse: Tensor,
    *,
    mass_block: int,
    row_start: Tensor | None = None,
    row_stop: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Exact block mass from a cached log-sum-exp (LSE), without computing the output.

    It is the mass that `attend(..., mass_block=...)` gives, if `lse` is its LSE. With the LSE of another
    index or an earlier step, probabilities are relative to what that one saw.

    Args:
        q, k, index, row_start, row_stop, scale, backend: As for `attend`.
        lse: float32 `[B, H, N]`, contiguous or not; rows at -inf have no mass.
        mass_block: How many sorted keys a block has.

    Returns:
        float32 `[B, H, G, ceil(M / mass_block)]`, as `Attended.mass`.

    Raises:
        ValueError, NotImplementedError: As `attend` does; ValueError also if `lse` or `mass_block` doesn't
            fit.
    """
    q, k = lowered(q, k)
    _check(q, k, k, index)
    rows = _rows(q, index, RowIntervals(row_start, row_stop))
    if mass_block < 1:
        raise ValueError(f"mass_block must be >= 1, got {mass_block}")
    if lse.shape != q.shape[:3] or lse.dtype != torch.float32 or lse.device != q.device:
        raise ValueError(
            f"lse must be float32 {list(q.shape[:3])} on {q.device}, got {lse.dtype} "
            f"{list(lse.shape)} on {lse.device}"
        )
    module = BACKENDS[_name(q, index, backend, False, True)]
    if q.shape[0] == 0:
        return _no_mass(q, k, index, mass_block)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    with without_autocast(q.device.type):
        return module.block_mass(q, k, index, lse, rows, scale, mass_block)


def backend_name(
    q: Tensor,
    index: SparseIndex,
    backend: str = "auto",
    *,
    lse: bool = False,
    mass: bool = False,
    value_width: int | None = None,
) -> str:
    """Name of the backend that runs such a call.

    Args:
        q, index, backend: As for `attend`.
        lse, mass: Whether these are wanted.
        value_width: Channels of v; those of q if None.

    Raises:
        ValueError: If the backend is unknown.
        NotImplementedError: If the named backend can't run this or fails its check, with the reason.
    """
    return _name(lowered(q)[0], index, backend, lse, mass, value_width or q.shape[-1])


def _rows(q: Tensor, index: SparseIndex, rows: RowIntervals) -> RowIntervals | None:
    """What a call's rows may see: the index's own intervals, the call's, or what both let through."""
    if rows.start is None and rows.stop is None:
        return index.rows
    rows.check((q.shape[0], q.shape[2]))
    for bound in (rows.start, rows.stop):
        if bound is not None and bound.device != q.device:
            raise ValueError(f"row_start and row_stop must be on {q.device}, got {bound.device}")
    return rows if index.rows is None else index.rows.meet(rows)


def _name(
    q: Tensor, index: SparseIndex, backend: str, lse: bool, mass: bool, width: int | None = None
) -> str:
    """As `backend_name`, for a `q` that autocast is done with."""
    if backend == "auto":
        return _first_that_can(q, index, lse, mass, width)
    if backend not in BACKENDS:
        raise ValueError(
            f"unknown backend {backend!r}; expected 'auto' or one of {sorted(BACKENDS)}"
        )
    if reason := _reason(backend, q, index, lse, mass, width):
        raise NotImplementedError(f"backend {backend!r} cannot run this: {reason}")
    return backend


def _first_that_can(q: Tensor, index: SparseIndex, lse: bool, mass: bool, width: int | None) -> str:
    reasons = []
    for name in AUTO:
        if q.device.type not in AUTO_DEVICES.get(name, (q.device.type,)):
            continue
        reason = _reason(name, q, index, lse, mass, width)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
        if reason is cpu.library.PROBLEM and not torch.compiler.is_compiling():
            _warn_once(f"{reason}; attention on the CPU runs on the slower backend 'gather'")
    raise NotImplementedError(f"no backend can run this: {'; '.join(reasons)}")


def _reason(
    name: str, q: Tensor, index: SparseIndex, lse: bool, mass: bool, width: int | None
) -> str | None:
    """Why a backend doesn't run this; None if it does."""
    module = BACKENDS[name]
    if reason := module.unsupported(q, index):
        return reason
    if width not in (None, q.shape[-1]) and (reason := _width_reason(module, q, width)):
        return reason
    if (lse or mass) and hasattr(module, "lacks") and (reason := module.lacks(q, lse, mass)):
        return reason
    if q.device.type in TESTED_DEVICES or name == "reference" or torch.compiler.is_compiling():
        return None
    found = verdict(module, q.device, q.shape[-1], q.dtype)
    if found is None or found.problem is None:
        return None
    _warn_once(f"backend {name!r} failed its check and isn't used: {found.problem}")
    return f"it failed its check on {q.device}: {found.problem}"


def _width_reason(module: ModuleType, q: Tensor, width: int) -> str | None:
    """Why a backend doesn't take values of another width than the keys'; None if it does."""
    if not hasattr(module, "unsupported_values"):
        return f"it takes v as wide as k, got head_dim {width} and {q.shape[-1]}"
    return module.unsupported_values(width)


def _nothing(
    q: Tensor, v: Tensor, index: SparseIndex, lse: bool, mass_block: int | None
) -> Attended:
    """What a call of no batch items gives."""
    return Attended(
        q.new_empty(*q.shape[:3], v.shape[-1]),
        q.new_empty(q.shape[:3], dtype=torch.float32) if lse else None,
        None if mass_block is None else _no_mass(q, v, index, mass_block),
    )


def _no_mass(q: Tensor, k: Tensor, index: SparseIndex, mass_block: int) -> Tensor:
    shape = (0, q.shape[1], index.max_groups, -(-k.shape[2] // mass_block))
    return q.new_empty(shape, dtype=torch.float32)


_said: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.warning(message)


def _check(q: Tensor, k: Tensor, v: Tensor, index: SparseIndex) -> None:
    q_shape, k_shape = q.shape, k.shape  # read once: small calls feel it
    if len(q_shape) != 4 or len(k_shape) != 4 or k_shape[:3] != v.shape[:-1]:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(
            f"q must be [B, H, N, D], k [B, num_kv_heads, M, D] and v like k but for its width, "
            f"got {shapes}"
        )
    if q_shape[0] != k_shape[0] or q_shape[3] != k_shape[3]:
        raise ValueError(f"q {tuple(q_shape)} and k {tuple(k_shape)} must agree in B and D")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k, v must share a floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    entry = index.entries[0]
    if not q.device == k.device == v.device == entry.q_offsets.device:
        raise ValueError(
            f"q, k, v and the index must be on one device, got {q.device}, {k.device}, {v.device}, "
            f"{entry.q_offsets.device}; use index.to(q.device)"
        )
    heads, kv_heads = q_shape[1], k_shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} heads must be a multiple of {kv_heads} key heads")
    sizes, want = (
        (heads, q_shape[2], k_shape[2]),
        (index.num_heads, entry.num_queries, entry.num_keys),
    )
    if sizes != want:
        raise ValueError(
            f"the index is for {want} heads, queries and keys, got {sizes}; "
            "build it for this layout"
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("sparse attention is for inference; call it under torch.no_grad()")
