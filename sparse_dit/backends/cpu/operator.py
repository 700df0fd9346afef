"""The kernel as torch operators, so that compiled and exported programs can call it.

`sparse_dit::attend` and `sparse_dit::block_mass` take a packed index (`packed.py`), which the kernel
checks in every call: a wrong one is an error, never a crash.

Letters in shapes: B batch, H heads, N query tokens, M key tokens, D channels, G query groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import library
from .library import ABI_VERSION, PACK_PROBLEM

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum DType of csrc/abi.h
NO_STRIDES = (0, 0, 0, 0)

OPERATORS = torch.library.Library("sparse_dit", "DEF")
OPERATORS.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor index, Tensor? kv_len, float scale, "
    "bool return_lse, int mass_block, int mass_groups) -> (Tensor out, Tensor lse, Tensor mass)"
)
OPERATORS.define(
    "block_mass(Tensor q, Tensor k, Tensor index, Tensor lse, Tensor? kv_len, float scale, "
    "int mass_block, int mass_groups) -> Tensor"
)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    kv_len: Tensor | None,
    scale: float,
    return_lse: bool,
    mass_block: int,
    mass_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The CPU implementation of `sparse_dit::attend`.

    Args:
        q: `[B, H, N, D]`, any strides.
        k, v: `[B, num_kv_heads, M, D]`, any strides.
        index: int32 `[words]`, packed for H heads, N queries and M keys.
        kv_len: int `[B]`, or None.
        scale: Factor of the logits.
        return_lse: Whether to compute the LSE.
        mass_block: Keys in a block of the mass; 0 for no mass.
        mass_groups: Rows of the mass, at least the largest G of the index; 0 for no mass.

    Returns:
        The output, in the memory layout of `q`; LSE, float32 `[B, H, N]`, `[0]` if not wanted; mass,
        float32 `[B, H, mass_groups, ceil(M / mass_block)]`, `[0]` if not wanted.

    Raises:
        ValueError: If the arguments don't fit together, or an input requires grad.
        NotImplementedError: If the kernel's library is missing.
    """
    _check(q, k, v, index, kv_len)
    _check_devices(q, k, v, index, kv_len)
    out, lse, mass = _results(q, k, return_lse, mass_block, mass_groups)
    if mass_block:
        mass.zero_()
    _run(q, k, v, index, kv_len, scale, mass_block, mass_groups, out, lse, mass, None)
    return out, lse, mass


def block_mass(
    q: Tensor,
    k: Tensor,
    index: Tensor,
    lse: Tensor,
    kv_len: Tensor | None,
    scale: float,
    mass_block: int,
    mass_groups: int,
) -> Tensor:
    """The CPU implementation of `sparse_dit::block_mass`: mass as of `attend`, without the output.

    Args:
        lse: float32 `[B, H, N]`, of an earlier call.

    Raises:
        ValueError, NotImplementedError: As `attend`.
    """
    _check(q, k, k, index, kv_len)
    _check_devices(q, k, lse, index, kv_len)
    _check_lse(q, lse)
    mass = _mass(q, k, mass_block, mass_groups).zero_()
    _run(q, k, None, index, kv_len, scale, mass_block, mass_groups, None, None, mass, lse)
    return mass


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    index: Tensor,
    kv_len: Tensor | None,
    scale: float,
    mass_block: int,
    mass_groups: int,
    out: Tensor | None,
    lse: Tensor | None,
    mass: Tensor,
    lse_in: Tensor | None,
) -> None:
    """Call the kernel with a `struct Problem` of csrc/abi.h."""
    if library.LIBRARY is None:
        raise NotImplementedError(str(library.PROBLEM))
    # locals, so that what they point to lives until the kernel is done
    index = index.contiguous()
    if kv_len is not None:
        kv_len = kv_len.to(torch.int64).contiguous()
    if lse_in is not None:
        lse_in = lse_in.contiguous()
    batch, heads, queries, channels = q.shape
    problem = PACK_PROBLEM(
        ABI_VERSION,
        DTYPES[q.dtype],
        batch,
        heads,
        k.shape[1],
        queries,
        k.shape[2],
        channels,
        q.data_ptr(),
        k.data_ptr(),
        0 if v is None else v.data_ptr(),
        0 if out is None else out.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        mass.data_ptr() if mass_block else 0,
        0 if lse_in is None else lse_in.data_ptr(),
        0 if kv_len is None else kv_len.data_ptr(),
        index.data_ptr(),
        len(index),
        *q.stride(),
        *k.stride(),
        *(NO_STRIDES if v is None else v.stride()),
        *(NO_STRIDES if out is None else out.stride()),
        mass_block,
        mass_groups,
        torch.get_num_threads(),
        library.LIBRARY.variant,
        scale,
    )
    library.LIBRARY.attend(problem)


def _check(q: Tensor, k: Tensor, v: Tensor, index: Tensor, kv_len: Tensor | None) -> None:
    """What the kernel can't see from addresses and numbers, for real and for fake tensors."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        shapes = [list(x.shape) for x in (q, k, v)]
        raise ValueError(f"q must be [B, H, N, D] and k, v [B, num_kv_heads, M, D], got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must agree in B and D")
    dtype = q.dtype
    if dtype not in DTYPES or k.dtype != dtype or v.dtype != dtype:
        raise ValueError(
            "q, k, v must share float32, bfloat16 or float16, got "
            f"{dtype}, {k.dtype}, {v.dtype}; convert them, or use backend='gather'"
        )
    if index.dtype != torch.int32 or index.ndim != 1:
        raise ValueError(f"the index must be int32 [words], got {index.dtype} {list(index.shape)}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("sparse attention is for inference; call it under torch.no_grad()")
    if kv_len is not None and (
        kv_len.shape != q.shape[:1] or kv_len.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"kv_len must be int [{q.shape[0]}], got {kv_len.dtype} {list(kv_len.shape)}"
        )


def _check_devices(*tensors: Tensor | None) -> None:
    if not all(x is None or x.is_cpu for x in tensors):
        devices = [str(x.device) for x in tensors if x is not None]
        raise ValueError(f"all tensors must be on the CPU, got {devices}; use another backend")


def _check_lse(q: Tensor, lse: Tensor) -> None:
    if lse.dtype != torch.float32 or lse.shape != q.shape[:3]:
        raise ValueError(
            f"lse must be float32 {list(q.shape[:3])}, got {lse.dtype} {list(lse.shape)}"
        )


def _results(
    q: Tensor, k: Tensor, return_lse: bool, mass_block: int, mass_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, LSE and mass, not filled; what isn't wanted is empty."""
    lse = q.new_empty(q.shape[:3] if return_lse else 0, dtype=torch.float32)
    if mass_block:
        mass = _mass(q, k, mass_block, mass_groups)
    else:
        mass = q.new_empty(0, dtype=torch.float32)
    return torch.empty_like(q), lse, mass  # which keeps the order of strides of `q`


def _mass(q: Tensor, k: Tensor, mass_block: int, mass_groups: int) -> Tensor:
    if mass_block < 1 or mass_groups < 1:
        raise ValueError(
            f"mass_block and mass_groups must be >= 1, got {mass_block} and {mass_groups}"
        )
    blocks = (k.shape[2] + mass_block - 1) // mass_block
    return q.new_empty((q.shape[0], q.shape[1], mass_groups, blocks), dtype=torch.float32)


def _fake_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    kv_len: Tensor | None,
    scale: float,
    return_lse: bool,
    mass_block: int,
    mass_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v, index, kv_len)
    return _results(q, k, return_lse, mass_block, mass_groups)


def _fake_block_mass(
    q: Tensor,
    k: Tensor,
    index: Tensor,
    lse: Tensor,
    kv_len: Tensor | None,
    scale: float,
    mass_block: int,
    mass_groups: int,
) -> Tensor:
    _check(q, k, k, index, kv_len)
    _check_lse(q, lse)
    return _mass(q, k, mass_block, mass_groups)


OPERATORS.impl("attend", attend, "CPU")
OPERATORS.impl("block_mass", block_mass, "CPU")
torch.library.register_fake("sparse_dit::attend", _fake_attend, lib=OPERATORS)
torch.library.register_fake("sparse_dit::block_mass", _fake_block_mass, lib=OPERATORS)
