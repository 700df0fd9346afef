"""What each thread computes on its own: opcodes as functions of NumPy arrays, one element a thread.

float32 is rounded to nearest even. Approximate instructions (`ex2.approx`, `div.full`) are computed as
exactly as float32 allows: a GPU may be wrong in the last bits there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy import ndarray as Array

BITS = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16), 32: np.dtype(np.uint32)}
BITS |= {64: np.dtype(np.uint64)}
TYPES = {"f16": np.dtype(np.float16), "bf16": BITS[16], "f32": np.dtype(np.float32)}
TYPES |= {"pred": np.dtype(bool), "bf16x2": BITS[32], "f16x2": BITS[32]}
for _bits, _raw in BITS.items():
    TYPES |= {f"b{_bits}": _raw, f"u{_bits}": _raw, f"s{_bits}": np.dtype(f"int{_bits}")}
LEAST = np.float32(2.0**-126)
COMPARE = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
COMPARE |= {"eq": np.equal, "ne": lambda a, b: (a != b) & (a == a) & (b == b), "neu": np.not_equal}
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


class Operation(NamedTuple):
    """How to compute one opcode.

    Args:
        reads: Types of its operands.
        result: From arrays of these, an array of the width of its register.
    """

    reads: tuple[np.dtype, ...]
    result: Callable[..., Array]


def operation(opcode: str) -> Operation | None:
    """The meaning of an opcode, None if this file doesn't know it."""
    name, *modifiers = opcode.split(".")
    if not modifiers or modifiers[-1] not in TYPES:
        return None
    kind = TYPES[modifiers[-1]]
    if name == "cvt":
        return _conversion(modifiers[:-2], modifiers[-2], modifiers[-1])
    if name == "setp" and len(modifiers) == 2 and modifiers[0] in COMPARE:
        return Operation((kind, kind), COMPARE[modifiers[0]])
    if name == "selp":
        return Operation((kind, kind, TYPES["pred"]), lambda a, b, p: np.where(p, a, b))
    if name == "mov" and len(modifiers) == 1:
        return Operation((kind,), lambda a: a)
    if name in LOGIC:
        return Operation((kind, kind), LOGIC[name])
    if name == "not":
        return Operation((kind,), np.invert)
    if name in ("shl", "shr"):
        return Operation((kind, BITS[32]), _left if name == "shl" else _right)
    if name == "bfe":
        return Operation((kind, BITS[32], BITS[32]), _field)
    return _floats(name, modifiers) if modifiers[-1] == "f32" else _integers(name, modifiers)


def _integers(name: str, modifiers: list[str]) -> Operation | None:
    kind = TYPES[modifiers[-1]]
    if kind.kind not in "iu":
        return None
    if "wide" in modifiers:
        wide = np.dtype(f"{kind.kind}{2 * kind.itemsize}")
        if name == "mul":
            return Operation((kind, kind), lambda a, b: a.astype(wide) * b.astype(wide))
        if name == "mad":
            return Operation(
                (kind, kind, wide), lambda a, b, c: a.astype(wide) * b.astype(wide) + c
            )
        return None
    known = {
        ("add",): Operation((kind, kind), np.add),
        ("sub",): Operation((kind, kind), np.subtract),
        ("neg",): Operation((kind,), np.negative),
        ("max",): Operation((kind, kind), np.maximum),
        ("min",): Operation((kind, kind), np.minimum),
        ("div",): Operation((kind, kind), _quotient),
        ("mul", "lo"): Operation((kind, kind), np.multiply),
        ("mad", "lo"): Operation((kind, kind, kind), lambda a, b, c: a * b + c),
    }
    return known.get((name, *modifiers[:-1]))


def _floats(name: str, modifiers: list[str]) -> Operation | None:
    f32 = TYPES["f32"]
    known = {
        ("add",): Operation((f32, f32), np.add),
        ("sub",): Operation((f32, f32), np.subtract),
        ("mul",): Operation((f32, f32), np.multiply),
        ("neg",): Operation((f32,), np.negative),
        ("max",): Operation((f32, f32), np.fmax),
        ("min",): Operation((f32, f32), np.fmin),
        ("div", "full"): Operation((f32, f32), np.divide),
        ("fma", "rn"): Operation((f32, f32, f32), _fused),
        ("fma", "rn", "ftz"): Operation((f32, f32, f32), _flushing(_fused)),
        ("ex2", "approx", "ftz"): Operation((f32,), _flushing(np.exp2)),
    }
    return known.get((name, *modifiers[:-1]))


def _conversion(rounding: list[str], to: str, source: str) -> Operation | None:
    if to in ("bf16x2", "f16x2") and source == "f32" and rounding == ["rn"]:
        half = bfloat16_bits if to == "bf16x2" else float16_bits
        kinds = TYPES["f32"], TYPES["f32"]
        return Operation(kinds, lambda high, low: half(high).astype(np.uint32) << 16 | half(low))
    known = {
        ("f32", "bf16"): from_bfloat16,
        ("bf16", "f32"): bfloat16_bits,
        ("f16", "f32"): float16_bits,
    }
    if (to, source) in known:
        return Operation((TYPES[source],), known[to, source])
    whole = TYPES[to].kind in "iu" and TYPES[source].kind in "iu"
    if whole or (to, source, rounding) in (("f32", "f16", []), ("f32", "s32", ["rn"])):
        return Operation((TYPES[source],), lambda a: a.astype(TYPES[to]))
    return None


def bfloat16_bits(x: Array) -> Array:
    """float32 as the bits of bfloat16, to nearest even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    high = (bits + odd + np.uint32(0x7FFF)) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), high).astype(np.uint16)


def float16_bits(x: Array) -> Array:
    """float32 as the bits of float16, to nearest even."""
    return x.astype(np.float16).view(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    """The bits of bfloat16 as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _fused(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.float64) * b + c).astype(np.float32)  # the product is exact


def _flushing(function: Callable[..., Array]) -> Callable[..., Array]:
    """With denormals taken for 0, coming and going."""
    return lambda *a: _flushed(function(*map(_flushed, a)))


def _flushed(x: Array) -> Array:
    return np.where(np.abs(x) < LEAST, np.copysign(np.float32(0), x), x)


def _quotient(a: Array, b: Array) -> Array:
    """Towards 0; of anything by 0 all ones."""
    x, y = a.astype(np.int64), np.where(b == 0, 1, b).astype(np.int64)
    whole = np.abs(x) // np.abs(y) * np.sign(x) * np.sign(y)
    return np.where(b == 0, -1, whole).astype(a.dtype)


def _left(a: Array, by: Array) -> Array:
    width = 8 * a.dtype.itemsize
    return np.where(by < width, a << np.minimum(by, width - 1).astype(a.dtype), 0).astype(a.dtype)


def _right(a: Array, by: Array) -> Array:
    width = 8 * a.dtype.itemsize
    moved = a >> np.minimum(by, width - 1).astype(a.dtype)
    return moved if a.dtype.kind == "i" else np.where(by < width, moved, 0).astype(a.dtype)


def _field(a: Array, start: Array, length: Array) -> Array:
    """`length` bits from `start` on, with the sign of the highest where `a` is signed."""
    width = 8 * a.dtype.itemsize
    raw = a.view(BITS[width])
    gap = (width - length).astype(raw.dtype)
    high = (raw >> start.astype(raw.dtype)) << gap
    return high.view(a.dtype) >> gap.astype(a.dtype)
