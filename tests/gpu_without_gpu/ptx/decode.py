"""What each instruction of a kernel does to its threads. What isn't known is an error, with its line."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray as Array

from . import exchange, transfers
from .arithmetic import BITS, TYPES, operation
from .machine import Kernel, Step, Threads
from .operands import address_of, reader
from .program import Fault, Instruction, Operand, Program

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
    units = [width for i in program.instructions if (width := transfers.shared_width(i))]
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


def _arithmetic(
    kinds: tuple[np.dtype, ...], result: Callable[..., Array], operands: tuple[Operand, ...]
) -> Step:
    target, *rest = operands
    readers = [reader(x, kind) for x, kind in zip(rest, kinds, strict=True)]

    def step(threads: Threads, mask: Array | None) -> None:
        threads.assign(target, result(*[read(threads) for read in readers]), mask)

    return step


def _unpack(halves: tuple[str, ...], whole: str) -> Step:
    read = reader(whole, BITS[32])

    def step(threads: Threads, mask: Array | None) -> None:
        both = np.ascontiguousarray(read(threads)).view(np.uint16).reshape(-1, 2)
        for i, name in enumerate(halves):
            if name != "_":
                threads.assign(name, both[:, i], mask)

    return step


def _pack(whole: str, halves: tuple[str, ...]) -> Step:
    low, high = (reader(x, BITS[16]) for x in halves)

    def step(threads: Threads, mask: Array | None) -> None:
        upper = high(threads).astype(np.uint32) << np.uint32(16)
        threads.assign(whole, low(threads).astype(np.uint32) | upper, mask)

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
    address, count = address_of(source, "u32"), len(targets)
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
    readers = [[reader(x, BITS[32]) for x in names] for names in sources]

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
    read, other = reader(source, BITS[32]), reader(by, BITS[32])

    def act(threads: Threads) -> None:
        lanes = np.broadcast_to(other(threads), (len(threads),))
        threads.assign(target, exchange.shuffled(read(threads), mode, lanes), None)

    return _together(act)


def _reduce(opcode: str, target: str, source: str, members: str) -> Step:
    functions = {
        "redux.sync.add.s32": np.add.reduce,
        "redux.sync.max.s32": np.maximum.reduce,
        "redux.sync.min.s32": np.minimum.reduce,
    }
    if opcode not in functions:
        raise Fault(f"unknown opcode: {opcode}")
    read, who = reader(source, TYPES["s32"]), reader(members, TYPES["s32"])

    def act(threads: Threads) -> None:
        if (who(threads) != -1).any():
            raise Fault("divergent: redux.sync of some threads of a warp")
        threads.assign(target, exchange.reduced(read(threads), functions[opcode]), None)

    return _together(act)


MADE: dict[str, Callable[..., Step]] = {
    "ld.param": transfers.parameter,
    "ld.global": transfers.load,
    "ld.shared": transfers.load,
    "st.global": transfers.store,
    "st.shared": transfers.store,
    "atom.global": transfers.atomic_add,
    "cp.async.ca": transfers.copy,
    "cp.async.cg": transfers.copy,
    "cp.async.commit_group": _commit,
    "cp.async.wait_group": _wait,
    "bar.sync": _barrier,
    "bar.warp.sync": _barrier,
    "ldmatrix": _matrices,
    "mma": _multiply,
    "shfl": _shuffle,
    "redux": _reduce,
}
