"""Runs a kernel: many blocks in step, until they branch apart; within a block all threads are in step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy import ndarray as Array

from .arithmetic import BITS
from .memory import GlobalMemory
from .program import Fault, Instruction, Program
from .shared import SharedMemory

KINDS = {"%p": np.dtype(bool), "%rs": BITS[16], "%r": BITS[32], "%rd": BITS[64]}
TOGETHER = 1 << 13  # threads in step
LIMIT = 100_000  # instructions of a block; none of ours comes near


@dataclass
class Threads:
    """The threads of some blocks, which execute the same instruction.

    Args:
        blocks: Number of each block in the grid.
        place: Its coordinates there, uint32 `[blocks, 3]`.
        grid: How many blocks there are along each axis.
        threads: In a block.
        memory, shared: What they reach.
        arguments: Bits of each parameter.
        registers: Bits of each register, one element a thread.
        executed: Instructions so far.
        asleep: Threads that jumped ahead, None if there are none.
        wake: Where those go on.
    """

    blocks: Array
    place: Array
    grid: tuple[int, ...]
    threads: int
    memory: GlobalMemory
    shared: SharedMemory
    arguments: list[int]
    registers: dict[str, Array] = field(default_factory=dict)
    executed: int = 0
    asleep: Array | None = None
    wake: int | None = None

    def __len__(self) -> int:
        return len(self.blocks) * self.threads

    def special(self, name: str) -> Array:
        """`%tid.x`, and `%ctaid` and `%nctaid` of an axis."""
        if name == "%tid.x":
            return np.tile(np.arange(self.threads, dtype=np.uint32), len(self.blocks))
        axis = "xyz".index(name[-1])
        if name.startswith("%nctaid"):
            return np.array([self.grid[axis]], np.uint32)
        return np.repeat(self.place[:, axis], self.threads)

    def block(self) -> Array:
        """The number of each thread's block."""
        return np.repeat(self.blocks, self.threads)

    def mask(self, guard: tuple[str, bool] | None) -> Array | None:
        """Threads that are awake and pass a guard; None if all are."""
        mask = None
        if guard is not None:
            mask = self.read(guard[0])
            mask = ~mask if guard[1] else mask
        if self.asleep is not None:
            mask = ~self.asleep if mask is None else mask & ~self.asleep
        return None if mask is None or mask.all() else mask

    def must_be_whole(self, mask: Array | None) -> None:
        """For what all threads of a block do together.

        Raises:
            Fault: If some don't.
        """
        if mask is not None:
            raise Fault("divergent: not all threads are here")

    def read(self, name: str) -> Array:
        """Bits of a register.

        Raises:
            Fault: If it was never written.
        """
        if name not in self.registers:
            raise Fault(f"uninitialised: register {name}")
        return self.registers[name]

    def assign(self, name: str, value: Array, mask: Array | None) -> None:
        """Write a register where `mask` is; None is everywhere."""
        value = value.view(register_kind(name))
        if len(value) != len(self):
            value = np.broadcast_to(value, (len(self),))
        if mask is not None:
            before = self.registers.get(name, np.zeros_like(value))
            value = np.where(mask, value, before)
        self.registers[name] = value

    def part(self, chosen: Array) -> Threads:
        """The threads of chosen blocks, bool `[blocks]`."""
        ids = np.repeat(chosen, self.threads)
        registers = {name: value[ids] for name, value in self.registers.items()}
        blocks, place = self.blocks[chosen], self.place[chosen]
        shared = self.shared.part(chosen.nonzero()[0])
        return Threads(
            blocks, place, self.grid, self.threads, self.memory, shared, self.arguments, registers,
            self.executed,
        )  # fmt: skip


def register_kind(name: str) -> np.dtype:
    """Type of a register's bits."""
    kind = KINDS.get(name.rstrip("0123456789"))
    if kind is None:
        raise Fault(f"unknown register: {name}")
    return kind


Step = Callable[[Threads, Array | None], None]


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel that can run; `decode.py` makes it.

    Args:
        program: Its text, parsed.
        steps: What each instruction does to threads where a mask is; None for branches and the end.
        shared: Bytes of shared memory.
        unit: Bytes that all accesses of shared memory consist of.
    """

    program: Program
    steps: tuple[Step | None, ...]
    shared: int
    unit: int

    def run(
        self, grid: tuple[int, ...], arguments: list[int], memory: GlobalMemory
    ) -> Counter[int]:
        """Run all blocks of a grid; how many of them executed each instruction.

        Args:
            grid: Blocks along x, y and z.
            arguments: Bits of each parameter.
            memory: What they point to.

        Raises:
            Fault: At the first thing that must not be.
        """
        numbers = np.arange(int(np.prod(grid)))
        size = self.program.threads
        at_once = max(1, TOGETHER // size)
        done: Counter[int] = Counter()
        for first in range(0, len(numbers), at_once):
            blocks = numbers[first : first + at_once]
            place = np.stack(np.unravel_index(blocks, grid[::-1])[::-1], 1).astype(np.uint32)
            shared = SharedMemory(len(blocks), size, self.shared, self.unit)
            threads = Threads(blocks, place, grid, size, memory, shared, arguments)
            with np.errstate(all="ignore"):
                self._run(threads, done)
        return done

    def _run(self, threads: Threads, done: Counter[int]) -> None:
        waiting = [(threads, 0)]
        while waiting:
            threads, at = waiting.pop()
            instruction = self.program.instructions[at]
            done[at] += len(threads.blocks)
            threads.executed += 1
            try:
                waiting += self._executed(threads, at, instruction)
            except Fault as fault:
                some = threads.blocks[:4].tolist()
                where = f"line {instruction.line}: {instruction.text} (blocks {some})"
                raise Fault(f"{fault}; {where}") from None

    def _executed(
        self, threads: Threads, at: int, instruction: Instruction
    ) -> list[tuple[Threads, int]]:
        """Execute one instruction; where which threads go on."""
        if threads.executed > LIMIT:
            raise Fault(f"endless: more than {LIMIT} instructions")
        if threads.wake == at:
            threads.asleep = threads.wake = None
        mask = threads.mask(instruction.guard)
        if instruction.opcode == "ret":
            threads.must_be_whole(mask)
            threads.shared.ended()
            return []
        step = self.steps[at]
        if step is None:
            target = self.program.labels[instruction.operands[0]]
            return _branch(threads, mask, at, target)
        if mask is None or mask.any():
            step(threads, mask)
        return [(threads, at + 1)]


def _branch(
    threads: Threads, mask: Array | None, at: int, target: int
) -> list[tuple[Threads, int]]:
    """Blocks part where they disagree; where threads of one block do, some sleep until the target."""
    if mask is None:
        return [(threads, target)]
    taken = mask.reshape(-1, threads.threads)
    some = taken.any(1)
    if not some.any():
        return [(threads, at + 1)]
    if (some == taken.all(1)).all() and threads.asleep is None:
        if some.all():
            return [(threads, target)]
        return [(threads.part(some), target), (threads.part(~some), at + 1)]
    if target <= at or threads.asleep is not None:
        raise Fault("divergent: threads of a block branch apart")
    threads.asleep, threads.wake = mask, target
    return [(threads, at + 1)]
