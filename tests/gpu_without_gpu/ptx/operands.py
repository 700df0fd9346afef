"""Operands of instructions as arrays, one element a thread."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray as Array

from .arithmetic import BITS, TYPES
from .machine import Threads
from .program import Address, Fault, Operand

Reader = Callable[[Threads], Array]


def reader(operand: Operand, kind: np.dtype) -> Reader:
    """An operand as an array of `kind`, one element a thread, or one for all."""
    if not isinstance(operand, str):
        raise Fault(f"unknown operand: {operand}")
    if operand.startswith(("%tid", "%ctaid", "%nctaid")):
        return lambda threads: threads.special(operand)
    if operand.startswith("%"):
        return lambda threads: threads.read(operand).view(kind)
    if operand == "global_smem":
        number = 0
    else:
        number = int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)
    if kind == TYPES["pred"]:
        constant = np.array([bool(number)])
    else:
        raw = BITS[8 * kind.itemsize]
        constant = np.array([number & ((1 << 8 * kind.itemsize) - 1)], raw).view(kind)
    return lambda threads: constant


def address_of(operand: Operand, kind: str) -> Reader:
    """The sum of an address, of type `kind`."""
    if not isinstance(operand, Address):
        raise Fault(f"unknown operand: {operand}")
    base, offset = reader(operand.base, TYPES[kind]), np.array([operand.offset], TYPES[kind])
    return lambda threads: np.broadcast_to(base(threads) + offset, (len(threads),))


def names_of(operand: Operand) -> tuple[str, ...]:
    """The registers of a vector, or the one."""
    return operand if isinstance(operand, tuple) else (operand,)


def ids_of(threads: Threads, mask: Array | None) -> Array:
    """Numbers of the threads in a mask."""
    return np.arange(len(threads)) if mask is None else mask.nonzero()[0]
