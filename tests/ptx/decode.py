"""What each instruction of a kernel does to its threads. What isn't known is an error, with its line."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray as Array

from . import exchange
from .arithmetic import BITS, TYPES, operation
from .machine import Kernel, Step, Threads
from .program import Address, Fault, Instruction, Operand, Program

Reader = Callable[[Threads], Array]
MOVES = ("bra", "bra.uni", "ret")
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32"


def decoded(program: Program, shared: int) -> Kernel:
    """A kernel that can run.

    Args:
        program: Its text, parsed.
        shared: Bytes of shared memory.

    Raises:
        Fault: If an instruction isn't known.
    """
    steps = []
    for instruction in program.instructions:
        try:
            steps.append(None if instruction.opcode in MOVES else _step(instruction))
        except Fault as fault:
            raise Fault(f"{fault}; line {instruction.line}: {instruction.text}") from None
    units = [width for i in program.instructions if (width := _shared_width(i))]
    return Kernel(program, tuple(steps), shared, min(units, default=16))


def _step(instruction: Instruction) -> Step:
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "mov.b32" and any(isinstance(x, tuple) for x in operands):
        return _unpack(*operands) if isinstance(operands[0], tuple) else _pack(*operands)
    meaning = operation(opcode)
    if meaning is not None:
        return _arithmetic(meaning.reads, meaning.result, operands)
    for name, make in MADE.items():
        if opcode == name or opcode.startswith(name + "."):
            return make(opcode, *operands)
    raise Fault(f"unknown opcode: {opcode}")


def _reader(operand: Operand, kind: np.dtype) -> Reader:
    """An operand as an array of `kind`, one element a thread, or one for all."""
    if not isinstance(operand, str):
        raise Fault(f"unknown operand: {operand}")
    if operand.startswith(("%tid", "%ctaid")):
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


def _address(operand: Operand, kind: str) -> Reader:
    if not isinstance(operand, Address):
        raise Fault(f"unknown operand: {operand}")
    base, offset = _reader(operand.base, TYPES[kind]), np.array([operand.offset], TYPES[kind])
    return lambda threads: np.broadcast_to(base(threads) + offset, (len(threads),))


def _arithmetic(
    kinds: tuple[np.dtype, ...], result: Callable[..., Array], operands: tuple[Operand, ...]
) -> Step:
    target, *rest = operands
    readers = [_reader(x, kind) for x, kind in zip(rest, kinds, strict=True)]

    def step(threads: Threads, mask: Array | None) -> None:
        threads.assign(target, result(*[read(threads) for read in readers]), mask)

    return step


def _unpack(halves: tuple[str, ...], whole: str) -> Step:
    read = _reader(whole, BITS[32])

    def step(threads: Threads, mask: Array | None) -> None:
        both = np.ascontiguousarray(read(threads)).view(np.uint16).reshape(-1, 2)
        for i, name in enumerate(halves):
            if name != "_":
                threads.assign(name, both[:, i], mask)

    return step


def _pack(whole: str, halves: tuple[str, ...]) -> Step:
    low, high = (_reader(x, BITS[16]) for x in halves)

    def step(threads: Threads, mask: Array | None) -> None:
        upper = high(threads).astype(np.uint32) << np.uint32(16)
        threads.assign(whole, low(threads).astype(np.uint32) | upper, mask)

    return step


def _parameter(opcode: str, target: str, source: Address) -> Step:
    number, kind = int(source.base.rsplit("_", 1)[1]), TYPES[opcode.split(".")[-1]]

    def step(threads: Threads, mask: Array | None) -> None:
        bits = np.array([threads.arguments[number]], np.uint64).view(np.uint8)
        value = bits[: kind.itemsize].view(kind)
        wide = BITS[64] if target.startswith("%rd") else BITS[8 * kind.itemsize]
        threads.assign(target, value.astype(wide), mask)

    return step


def _element(opcode: str) -> int:
    """Bytes of what one register of a load or store has."""
    return TYPES[opcode.split(".")[-1]].itemsize


def _names(operand: Operand) -> tuple[str, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def _ids(threads: Threads, mask: Array | None) -> Array:
    return np.arange(len(threads)) if mask is None else mask.nonzero()[0]


def _load(opcode: str, targets: Operand, source: Operand) -> Step:
    in_global = ".global" in opcode
    size, names = _element(opcode), _names(targets)
    address = _address(source, "u64" if in_global else "u32")

    def step(threads: Threads, mask: Array | None) -> None:
        ids = _ids(threads, mask)
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


def _store(opcode: str, target: Operand, sources: Operand) -> Step:
    in_global = ".global" in opcode
    size = _element(opcode)
    address = _address(target, "u64" if in_global else "u32")
    readers = [_reader(x, BITS[max(16, 8 * size)]) for x in _names(sources)]

    def step(threads: Threads, mask: Array | None) -> None:
        ids = _ids(threads, mask)
        values = np.empty((len(threads), len(readers)), BITS[8 * size])
        for i, read in enumerate(readers):
            values[:, i] = read(threads)
        words = values.view(BITS[8 * min(4, size * len(readers))])[ids]
        if in_global:
            threads.memory.store(address(threads)[ids], words, threads.block()[ids])
        else:
            threads.shared.store(ids, address(threads)[ids], words)

    return step


def _atomic_add(opcode: str, target: str, where: Operand, what: Operand) -> Step:
    if not opcode.endswith(".add.f32"):
        raise Fault(f"unknown opcode: {opcode}")
    address, read = _address(where, "u64"), _reader(what, TYPES["f32"])

    def step(threads: Threads, mask: Array | None) -> None:
        ids = _ids(threads, mask)
        before = np.zeros(len(threads), np.float32)
        before[ids] = threads.memory.add(address(threads)[ids], read(threads)[ids])
        threads.assign(target, before, mask)

    return step


def _copy(opcode: str, to: Operand, source: Operand, width: str, *live: Operand) -> Step:
    into, out_of, size = _address(to, "u32"), _address(source, "u64"), int(width, 0)
    bytes_read = _reader(live[0], BITS[32]) if live else _reader(width, BITS[32])

    def step(threads: Threads, mask: Array | None) -> None:
        ids = _ids(threads, mask)
        wanted = np.broadcast_to(bytes_read(threads), (len(threads),))[ids]
        if not np.isin(wanted, (0, size)).all():
            raise Fault(f"unknown opcode: copies of parts of {size} bytes")
        values = np.zeros((len(ids), size // 4), np.uint32)  # what isn't read is 0
        read = wanted == size
        values[read] = threads.memory.load(out_of(threads)[ids][read], size)
        threads.shared.copy(ids, into(threads)[ids], values)

    return step


def _together(act: Callable[[Threads], None]) -> Step:
    """What all threads do at once."""

    def step(threads: Threads, mask: Array | None) -> None:
        threads.must_be_whole(mask)
        act(threads)

    return step


def _commit(opcode: str) -> Step:
    return _together(lambda threads: threads.shared.commit())


def _wait(opcode: str, groups: str) -> Step:
    return _together(lambda threads: threads.shared.wait(int(groups, 0)))


def _barrier(opcode: str, which: str) -> Step:
    if (opcode, which) not in (("bar.sync", "0"), ("bar.warp.sync", "-1")):
        raise Fault(f"unknown opcode: {opcode} {which}")
    return _together(lambda threads: threads.shared.barrier(opcode == "bar.sync"))


def _matrices(opcode: str, targets: tuple[str, ...], source: Operand) -> Step:
    address, count = _address(source, "u32"), len(targets)
    lanes = np.arange(8 * count)

    def act(threads: Threads) -> None:
        ids = (np.arange(0, len(threads), exchange.WARP)[:, None] + lanes).reshape(-1)
        rows = threads.shared.load(ids, address(threads)[ids], 16).reshape(-1, count, 8, 4)
        for name, value in zip(targets, exchange.fragments(rows, ".trans" in opcode), strict=True):
            threads.assign(name, value, None)

    return _together(act)


def _multiply(opcode: str, *operands: tuple[str, ...]) -> Step:
    if opcode not in (MMA.format("bf16"), MMA.format("f16")):
        raise Fault(f"unknown opcode: {opcode}")
    targets, *sources = operands
    readers = [[_reader(x, BITS[32]) for x in names] for names in sources]

    def act(threads: Threads) -> None:
        whole = (len(threads),)
        a, b, c = ([np.broadcast_to(r(threads), whole) for r in group] for group in readers)
        results = exchange.multiplied(a, b, c, "bf16" in opcode)
        for name, value in zip(targets, results, strict=True):
            threads.assign(name, value, None)

    return _together(act)


def _shuffle(opcode: str, target: str, source: str, by: str, clamp: str, members: str) -> Step:
    mode = opcode.split(".")[2]
    if mode not in ("bfly", "idx") or (clamp, members) != ("31", "-1"):
        raise Fault(f"unknown opcode: {opcode} with {clamp}, {members}")
    read, other = _reader(source, BITS[32]), _reader(by, BITS[32])

    def act(threads: Threads) -> None:
        lanes = np.broadcast_to(other(threads), (len(threads),))
        threads.assign(target, exchange.shuffled(read(threads), mode, lanes), None)

    return _together(act)


def _reduce(opcode: str, target: str, source: str, members: str) -> Step:
    functions = {"redux.sync.add.s32": np.add.reduce, "redux.sync.max.s32": np.maximum.reduce}
    if opcode not in functions:
        raise Fault(f"unknown opcode: {opcode}")
    read, who = _reader(source, TYPES["s32"]), _reader(members, TYPES["s32"])

    def act(threads: Threads) -> None:
        if (who(threads) != -1).any():
            raise Fault("divergent: redux.sync of some threads of a warp")
        threads.assign(target, exchange.reduced(read(threads), functions[opcode]), None)

    return _together(act)


def _shared_width(instruction: Instruction) -> int | None:
    """Bytes of a thread's access of shared memory, None if there is none."""
    name, operands = instruction.opcode, instruction.operands
    if name.startswith("ldmatrix"):
        return 16
    if name.startswith("cp.async.c") and name != "cp.async.commit_group":
        return int(operands[2], 0)
    if name.startswith(("ld.shared", "st.shared")):
        registers = operands[1] if name.startswith("st") else operands[0]
        return _element(name) * len(_names(registers))
    return None


MADE: dict[str, Callable[..., Step]] = {
    "ld.param": _parameter,
    "ld.global": _load,
    "ld.shared": _load,
    "st.global": _store,
    "st.shared": _store,
    "atom.global": _atomic_add,
    "cp.async.ca": _copy,
    "cp.async.cg": _copy,
    "cp.async.commit_group": _commit,
    "cp.async.wait_group": _wait,
    "bar.sync": _barrier,
    "bar.warp.sync": _barrier,
    "ldmatrix": _matrices,
    "mma": _multiply,
    "shfl": _shuffle,
    "redux": _reduce,
}
