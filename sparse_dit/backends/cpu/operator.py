"""The kernel as torch operators, so that compiled and exported programs can call it.

- `sparse_dit::attend(q, k, v, index, row_start, row_stop, scale) -> out`
- `sparse_dit::attend_measured(..., return_lse, mass_block, mass_groups) -> (out, lse, mass)`
- `sparse_dit::block_mass(q, k, index, lse, row_start, row_stop, scale, mass_block, mass_groups) -> mass`

They take a packed index (`packed.py`), which the kernel checks in every call: a wrong one is an error,
never a crash. Small problems are dominated by what happens here, hence the plain style of `attend`.

Letters in shapes: B batch, H heads, N query tokens, M key tokens, D channels, E those of v, G query groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import library
from .library import ABI_VERSION, PACK_PROBLEM

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum DType of csrc/abi.h
NO_STRIDES, NO_ROWS = (0, 0, 0, 0), (0, 0, 0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    row_start: Tensor | None,
    row_stop: Tensor | None,
    scale: float,
) -> Tensor:
    """The CPU implementation of `sparse_dit::attend`.

    Args:
        q: `[B, H, N, D]`, any strides.
        k, v: `[B, num_kv_heads, M, D]` and `[B, num_kv_heads, M, E]`, any strides.
        index: int32 `[words]`, packed for H heads, N queries and M keys.
        row_start, row_stop: int32 `[B, N]`, any strides; None for 0 and M.
        scale: Factor of the logits.

    Returns:
        `[B, H, N, E]` in the memory layout of `q`.

    Raises:
        ValueError: If the arguments don't fit together, or an input requires grad.
        NotImplementedError: If the kernel's library is missing.
    """
    _check(q, k, v, index, row_start, row_stop)
    out = _output(q, v)
    _run(q, k, v, index, row_start, row_stop, scale, out)
    return out


def attend_measured(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    row_start: Tensor | None,
    row_stop: Tensor | None,
    scale: float,
    return_lse: bool,
    mass_block: int,
    mass_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The CPU implementation of `sparse_dit::attend_measured`.

    Args:
        q, k, v, index, row_start, row_stop, scale: As in `attend`.
        return_lse: Whether to compute the LSE.
        mass_block: Keys in a block of the mass; 0 for no mass.
        mass_groups: Rows of the mass, at least the largest G of the index; 0 for no mass.

    Returns:
        The output; LSE, float32 `[B, H, N]`, `[0]` if not wanted; mass, float32
        `[B, H, mass_groups, ceil(M / mass_block)]`, `[0]` if not wanted.

    Raises:
        ValueError, NotImplementedError: As `attend`.
    """
    _check(q, k, v, index, row_start, row_stop)
    out, lse, mass = _results(q, v, return_lse, mass_block, mass_groups)
    mass.zero_()
    blocks, wanted = (mass_block, mass_groups), lse if return_lse else None
    _run(q, k, v, index, row_start, row_stop, scale, out, wanted, mass, None, blocks)
    return out, lse, mass


def block_mass(
    q: Tensor,
    k: Tensor,
    index: Tensor,
    lse: Tensor,
    row_start: Tensor | None,
    row_stop: Tensor | None,
    scale: float,
    mass_block: int,
    mass_groups: int,
) -> Tensor:
    """The CPU implementation of `sparse_dit::block_mass`: the mass without the output.

    Args:
        q, k, index, row_start, row_stop, scale, mass_block, mass_groups: As in `attend_measured`.
        lse: float32 `[B, H, N]`, of an earlier call.

    Raises:
        ValueError, NotImplementedError: As `attend`.
    """
    _check(q, k, k, index, row_start, row_stop)
    _check_lse(q, lse)
    mass = _mass(q, k, mass_block, mass_groups).zero_()
    blocks = (mass_block, mass_groups)
    _run(q, k, None, index, row_start, row_stop, scale, None, None, mass, lse.contiguous(), blocks)
    return mass


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    index: Tensor,
    row_start: Tensor | None,
    row_stop: Tensor | None,
    scale: float,
    out: Tensor | None,
    lse: Tensor | None = None,
    mass: Tensor | None = None,
    lse_in: Tensor | None = None,
    blocks: tuple[int, int] = (0, 0),
) -> None:
    """Call the kernel with a `struct Problem` of csrc/abi.h."""
    kernel = library.LIBRARY
    if kernel is None:
        raise NotImplementedError(str(library.PROBLEM))
    batch, heads, queries, channels = q.shape
    _, kv_heads, keys, _ = k.shape
    starts = NO_ROWS if row_start is None else (row_start.data_ptr(), *row_start.stride())
    stops = NO_ROWS if row_stop is None else (row_stop.data_ptr(), *row_stop.stride())
    problem = PACK_PROBLEM(
        ABI_VERSION,
        DTYPES[q.dtype],
        batch,
        heads,
        kv_heads,
        queries,
        keys,
        channels,
        channels if v is None else v.shape[3],
        q.data_ptr(),
        k.data_ptr(),
        0 if v is None else v.data_ptr(),
        0 if out is None else out.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        0 if mass is None else mass.data_ptr(),
        0 if lse_in is None else lse_in.data_ptr(),
        starts[0],
        stops[0],
        index.data_ptr(),
        index.numel(),
        *q.stride(),
        *k.stride(),
        *(NO_STRIDES if v is None else v.stride()),
        *(NO_STRIDES if out is None else out.stride()),
        *starts[1:],
        *stops[1:],
        *blocks,
        torch.get_num_threads(),
        kernel.variant,
        scale,
    )
    kernel.attend(problem)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    row_start: Tensor | None,
    row_stop: Tensor | None,
) -> None:
    """What the kernel can't see from addresses and numbers."""
    if not (q.is_cpu and k.is_cpu and v.is_cpu and index.is_cpu):
        devices = [str(x.device) for x in (q, k, v, index)]
        raise ValueError(f"q, k, v and the index must be on the CPU, got {devices}")
    for rows in (row_start, row_stop):
        if rows is not None and not rows.is_cpu:
            raise ValueError(f"row_start and row_stop must be on the CPU, got {rows.device}")
    _check_meta(q, k, v, index, row_start, row_stop)


def _check_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    row_start: Tensor | None,
    row_stop: Tensor | None,
) -> None:
    """The same for tensors without data, which may pretend to be anywhere."""
    if not q.device == k.device == v.device == index.device:
        devices = [str(x.device) for x in (q, k, v, index)]
        raise ValueError(f"q, k, v and the index must be on one device, got {devices}")
    _check_meta(q, k, v, index, row_start, row_stop)


def _check_meta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    row_start: Tensor | None,
    row_stop: Tensor | None,
) -> None:
    """What holds of fake tensors too."""
    q_shape, k_shape, dtype = q.shape, k.shape, q.dtype
    if len(q_shape) != 4 or len(k_shape) != 4 or k_shape[:3] != v.shape[:-1]:
        shapes = [list(x.shape) for x in (q, k, v)]
        raise ValueError(
            f"q must be [B, H, N, D], k [B, num_kv_heads, M, D] and v like k but for its width, got {shapes}"
        )
    if q_shape[0] != k_shape[0] or q_shape[3] != k_shape[3]:
        raise ValueError(f"q {list(q_shape)} and k {list(k_shape)} must agree in B and D")
    if dtype not in DTYPES or k.dtype != dtype or v.dtype != dtype:
        raise ValueError(
            "q, k, v must share float32, bfloat16 or float16, got "
            f"{dtype}, {k.dtype}, {v.dtype}; convert them, or use backend='gather'"
        )
    if index.dtype != torch.int32 or index.ndim != 1 or not index.is_contiguous():
        raise ValueError(
            f"the index must be contiguous int32 [words], got {index.dtype} {list(index.shape)}"
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("sparse attention is for inference; call it under torch.no_grad()")
    want = (q_shape[0], q_shape[2])
    for name, rows in (("row_start", row_start), ("row_stop", row_stop)):
        if rows is not None and (rows.shape != want or rows.dtype != torch.int32):
            raise ValueError(
                f"{name} must be int32 {list(want)}, got {rows.dtype} {list(rows.shape)}"
            )


def _check_lse(q: Tensor, lse: Tensor) -> None:
    if lse.dtype != torch.float32 or lse.shape != q.shape[:3] or lse.device != q.device:
        raise ValueError(
            f"lse must be float32 {list(q.shape[:3])} on {q.device}, got {lse.dtype} "
            f"{list(lse.shape)} on {lse.device}"
        )


def _output(q: Tensor, v: Tensor) -> Tensor:
    """Room for the output, in the order of strides of `q`, or, if v is of another width, of its tokens."""
    batch, heads, queries, channels = q.shape
    if v.shape[3] == channels:
        return torch.empty_like(q)
    if q.stride(1) < q.stride(2):
        return q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)
    return q.new_empty(batch, heads, queries, v.shape[3])


def _results(
    q: Tensor, v: Tensor, return_lse: bool, mass_block: int, mass_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, LSE and mass, not filled; what isn't wanted is empty."""
    nothing = q.new_empty(0, dtype=torch.float32)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else nothing
    mass = _mass(q, v, mass_block, mass_groups) if mass_block else nothing.clone()
    return _output(q, v), lse, mass


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
    row_start: Tensor | None,
    row_stop: Tensor | None,
    scale: float,
) -> Tensor:
    _check_fake(q, k, v, index, row_start, row_stop)
    return _output(q, v)


def _fake_attend_measured(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    row_start: Tensor | None,
    row_stop: Tensor | None,
    scale: float,
    return_lse: bool,
    mass_block: int,
    mass_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_fake(q, k, v, index, row_start, row_stop)
    return _results(q, v, return_lse, mass_block, mass_groups)


def _fake_block_mass(
    q: Tensor,
    k: Tensor,
    index: Tensor,
    lse: Tensor,
    row_start: Tensor | None,
    row_stop: Tensor | None,
    scale: float,
    mass_block: int,
    mass_groups: int,
) -> Tensor:
    _check_fake(q, k, k, index, row_start, row_stop)
    _check_lse(q, lse)
    return _mass(q, k, mass_block, mass_groups)


OPERATORS = torch.library.Library("sparse_dit", "DEF")  # they live as long as this does
SHARED = "Tensor? row_start, Tensor? row_stop, float scale"
MASS = "int mass_block, int mass_groups"
KEYS = "Tensor q, Tensor k"
for _name, _takes, _returns, _real, _fake in (
    ("attend", f"{KEYS}, Tensor v, Tensor index, {SHARED}", "Tensor", attend, _fake_attend),
    (
        "attend_measured",
        f"{KEYS}, Tensor v, Tensor index, {SHARED}, bool return_lse, {MASS}",
        "(Tensor out, Tensor lse, Tensor mass)",
        attend_measured,
        _fake_attend_measured,
    ),
    (
        "block_mass",
        f"{KEYS}, Tensor index, Tensor lse, {SHARED}, {MASS}",
        "Tensor",
        block_mass,
        _fake_block_mass,
    ),
):
    OPERATORS.define(f"{_name}({_takes}) -> {_returns}")
    OPERATORS.impl(_name, _real, "CPU")
    torch.library.register_fake(f"sparse_dit::{_name}", _fake, lib=OPERATORS)
