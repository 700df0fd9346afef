"""What the threads of a warp compute together, on arrays with one element a thread, warp after warp."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray as Array

from .arithmetic import from_bfloat16

WARP = 32
ROWS, PAIRS = 8, 4  # a warp holds an 8x8 matrix of 16-bit numbers as 8 rows of 4 pairs
LANES = np.arange(WARP)


def multiplied(a: list[Array], b: list[Array], c: list[Array], bfloat16: bool) -> list[Array]:
    """`mma.m16n8k16`: from registers of A (4), B (2) and C (4) those of A @ B + C, float32."""
    warps = len(a[0]) // WARP
    left = np.empty((warps, 16, 16), np.float32)
    right = np.empty((warps, 8, 16), np.float32)  # transposed
    total = np.empty((warps, 16, 8), np.float32)
    for i, x in enumerate(a):
        rows, columns = ROWS * (i & 1), 8 * (i >> 1)
        left[:, rows : rows + ROWS, columns : columns + 8] = _matrix(x, bfloat16)
    for i, x in enumerate(b):
        right[:, :, 8 * i : 8 * i + 8] = _matrix(x, bfloat16)
    for i, x in enumerate(c):
        rows = ROWS * (i >> 1)
        total[:, rows : rows + ROWS, i & 1 :: 2] = x.view(np.float32).reshape(-1, ROWS, PAIRS)
    total += left @ right.swapaxes(1, 2)
    parts = ((ROWS * (i >> 1), i & 1) for i in range(4))
    return [total[:, row : row + ROWS, odd::2].reshape(-1).view(np.uint32) for row, odd in parts]


def _matrix(x: Array, bfloat16: bool) -> Array:
    """float32 `[warps, 8, 8]` of a register that holds pairs of a row."""
    halves = np.ascontiguousarray(x).view(np.uint16)
    numbers = from_bfloat16(halves) if bfloat16 else halves.view(np.float16).astype(np.float32)
    return numbers.reshape(-1, ROWS, 2 * PAIRS)


def fragments(rows: Array, transposed: bool) -> Array:
    """`ldmatrix`: from rows of matrices, uint32 `[warps, K, 8, 4]`, K registers `[K, threads]`."""
    if transposed:
        halves = rows.view(np.uint16).swapaxes(2, 3)
        rows = np.ascontiguousarray(halves).view(np.uint32)
    return np.ascontiguousarray(rows.swapaxes(0, 1)).reshape(rows.shape[1], -1)


def shuffled(x: Array, mode: str, by: Array) -> Array:
    """`shfl.sync` among all lanes, by `bfly` or `idx`."""
    other = (LANES ^ by.reshape(-1, WARP)) if mode == "bfly" else by.reshape(-1, WARP) % WARP
    return np.take_along_axis(x.reshape(-1, WARP), other.astype(np.int64), 1).reshape(-1)


def reduced(x: Array, function: Callable[..., Array]) -> Array:
    """`redux.sync` among all lanes."""
    return np.repeat(function(x.reshape(-1, WARP), axis=1, dtype=x.dtype), WARP)
