"""Repairs of bfloat16 in Triton's interpreter, for tests only (wrong in 3.7.1 and 3.9.0).

It multiplies the bit patterns of bfloat16 operands in `tl.dot`, and cuts float32 off where GPUs round to
nearest even.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 as the bits of bfloat16, uint16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    high = ((bits + odd + np.uint32(0x7FFF)) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), high).reshape(np.shape(x))


def widened(x: np.ndarray) -> np.ndarray:
    """The bits of bfloat16, uint16, as float32."""
    bits = np.ascontiguousarray(x).astype(np.uint32) << np.uint32(16)
    return bits.view(np.float32).reshape(np.shape(x))


class Repaired:
    """The interpreter's own builder methods, kept, and what replaces them."""

    cast = interpreter.InterpreterBuilder.cast_impl
    dot = interpreter.InterpreterBuilder.create_dot

    @staticmethod
    def cast_impl(builder, source, wanted):
        """As the interpreter's, but rounds."""
        pair = source.dtype.scalar, wanted.scalar
        if pair == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(rounded(source.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(widened(source.data), tl.float32)
        return Repaired.cast(builder, source, wanted)

    @staticmethod
    def create_dot(builder, a, b, *rest):
        """As the interpreter's, with bfloat16 made float32 before, which is exact."""
        a, b = (
            Repaired.cast_impl(builder, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return Repaired.dot(builder, a, b, *rest)


def install() -> None:
    """Repair the interpreter in this process."""
    builder = interpreter.InterpreterBuilder
    builder.cast_impl = lambda self, *a: Repaired.cast_impl(self, *a)
    builder.create_dot = lambda self, *a: Repaired.create_dot(self, *a)
