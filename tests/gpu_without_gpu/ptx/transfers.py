"""Loads, stores and copies: what moves between registers, shared and global memory."""

from __future__ import annotations

import numpy as np
from numpy import ndarray as Array

from .arithmetic import BITS, TYPES
from .machine import Step, Threads
from .operands import address_of, ids_of, names_of, reader
from .program import Address, Fault, Instruction, Operand


def parameter(opcode: str, target: str, source: Address) -> Step:
    """`ld.param`, widened by its sign to what the register holds."""
    number, kind = int(source.base.rsplit("_", 1)[1]), TYPES[opcode.split(".")[-1]]

    def step(threads: Threads, mask: Array | None) -> None:
        bits = np.array([threads.arguments[number]], np.uint64).view(np.uint8)
        value = bits[: kind.itemsize].view(kind)
        wide = BITS[64] if target.startswith("%rd") else BITS[8 * kind.itemsize]
        threads.assign(target, value.astype(wide), mask)

    return step


def load(opcode: str, targets: Operand, source: Operand) -> Step:
    """`ld.global` and `ld.shared`, of one register or a vector."""
    in_global = ".global" in opcode
    size, names = element_size(opcode), names_of(targets)
    address = address_of(source, "u64" if in_global else "u32")

    def step(threads: Threads, mask: Array | None) -> None:
        ids = ids_of(threads, mask)
        where, width = address(threads)[ids], size * len(names)
        memory, shared = threads.memory, threads.shared
        words = memory.load(where, width) if in_global else shared.load(ids, where, width)
        elements = np.ascontiguousarray(words).view(BITS[8 * size])
        for i, name in enumerate(names):
            kind = TYPES["b16"] if name.startswith("%rs") else BITS[8 * size]
            value = np.zeros(len(threads), kind)
            value[ids] = elements[:, i]
            threads.assign(name, value, mask)

    return step


def store(opcode: str, target: Operand, sources: Operand) -> Step:
    """`st.global` and `st.shared`."""
    in_global = ".global" in opcode
    size = element_size(opcode)
    address = address_of(target, "u64" if in_global else "u32")
    readers = [reader(x, BITS[max(16, 8 * size)]) for x in names_of(sources)]

    def step(threads: Threads, mask: Array | None) -> None:
        ids = ids_of(threads, mask)
        values = np.empty((len(threads), len(readers)), BITS[8 * size])
        for i, read in enumerate(readers):
            values[:, i] = read(threads)
        words = values.view(BITS[8 * min(4, size * len(readers))])[ids]
        if in_global:
            threads.memory.store(address(threads)[ids], words, threads.block()[ids])
        else:
            threads.shared.store(ids, address(threads)[ids], words)

    return step


def atomic_add(opcode: str, target: str, where: Operand, what: Operand) -> Step:
    """`atom.global.add.f32`."""
    if not opcode.endswith(".add.f32"):
        raise Fault(f"unknown opcode: {opcode}")
    address, read = address_of(where, "u64"), reader(what, TYPES["f32"])

    def step(threads: Threads, mask: Array | None) -> None:
        ids = ids_of(threads, mask)
        before = np.zeros(len(threads), np.float32)
        before[ids] = threads.memory.add(address(threads)[ids], read(threads)[ids])
        threads.assign(target, before, mask)

    return step


def copy(opcode: str, to: Operand, source: Operand, width: str, *live: Operand) -> Step:
    """`cp.async`: what a thread doesn't read is 0."""
    into, out_of, size = address_of(to, "u32"), address_of(source, "u64"), int(width, 0)
    bytes_read = reader(live[0], BITS[32]) if live else reader(width, BITS[32])

    def step(threads: Threads, mask: Array | None) -> None:
        ids = ids_of(threads, mask)
        wanted = np.broadcast_to(bytes_read(threads), (len(threads),))[ids]
        if not np.isin(wanted, (0, size)).all():
            raise Fault(f"unknown opcode: copies of parts of {size} bytes")
        values = np.zeros((len(ids), size // 4), np.uint32)  # what isn't read is 0
        read = wanted == size
        values[read] = threads.memory.load(out_of(threads)[ids][read], size)
        threads.shared.copy(ids, into(threads)[ids], values)

    return step


def shared_width(instruction: Instruction) -> int | None:
    """Bytes of a thread's access of shared memory, None if there is none."""
    name, operands = instruction.opcode, instruction.operands
    if name.startswith("ldmatrix"):
        return 16
    if name.startswith("cp.async.c") and name != "cp.async.commit_group":
        return int(operands[2], 0)
    if name.startswith(("ld.shared", "st.shared")):
        registers = operands[1] if name.startswith("st") else operands[0]
        return element_size(name) * len(names_of(registers))
    return None


def element_size(opcode: str) -> int:
    """Bytes of what one register of a load or store has."""
    return TYPES[opcode.split(".")[-1]].itemsize
