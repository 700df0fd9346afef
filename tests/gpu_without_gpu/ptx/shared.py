"""Shared memory of some blocks that run in step, and who may see what in it.

Warps run in any order between barriers, and copies land at any time before they are waited for. So every
place remembers who wrote it and when, when each warp read it, and whether a copy is on its way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from .arithmetic import BITS
from .exchange import WARP
from .program import Fault

NEVER = -1
JUNK = 0xA5  # NaN-like where nothing was written or a copy is on its way


@dataclass
class Copy:
    """Copies on their way: for each, who asked for it, where to, and what, uint32 `[n, words]`."""

    thread: Array
    address: Array
    values: Array


class SharedMemory:
    """Shared memory of blocks of `threads` threads, and its clock of barriers.

    Args:
        blocks: How many.
        threads: In each.
        size: Bytes in each.
        unit: Bytes that any access consists of.
    """

    def __init__(self, blocks: int, threads: int, size: int, unit: int):
        self.threads, self.size, self.unit = threads, size, unit
        self.stride = -(-size // 16) * 16
        places = blocks * self.stride // unit
        self.bytes = np.full(blocks * self.stride, JUNK, np.uint8)
        self.wrote_at = np.full(places, NEVER, np.int32)
        self.writer = np.zeros(places, np.int16)
        self.read_at = np.full((threads // WARP, places), NEVER, np.int32)  # by each warp
        self.last_read = np.full(places, NEVER, np.int32)  # by any
        self.flying = np.zeros(places, bool)
        self.now = self.block_barrier = self.warp_barrier = 0
        self.groups: list[list[Copy]] = []
        self.open: list[Copy] = []

    def barrier(self, whole_block: bool) -> None:
        """All threads of each block, or of each warp, waited for each other."""
        self.now += 1
        self.warp_barrier = self.now
        if whole_block:
            self.block_barrier = self.now

    def load(self, thread: Array, address: Array, width: int) -> Array:
        """uint `[n, words]` from n addresses of `width` bytes.

        Raises:
            Fault: If what is there can't be known.
        """
        rows = self._rows(thread, address, width)
        wrote_at = self._places(self.wrote_at, width)[rows]
        if (wrote_at == NEVER).any():
            raise Fault("uninitialised: read of shared memory that nobody wrote")
        if self._places(self.flying, width)[rows].any():
            raise Fault("in flight: read of a copy that wasn't waited for")
        self._no_race(thread, rows, width, wrote_at, "read of what another thread wrote")
        by_warp = self.read_at.reshape(len(self.read_at), -1, width // self.unit)
        by_warp[thread % self.threads // WARP, rows] = self.now
        self._places(self.last_read, width)[rows] = self.now
        word = BITS[8 * min(width, 4)]
        return self.bytes.view(word).reshape(-1, max(1, width // 4))[rows]

    def store(self, thread: Array, address: Array, values: Array) -> None:
        """Store `values` `[n, words]`.

        Raises:
            Fault: If another thread may still read, or write, what is there.
        """
        width = values.shape[1] * values.dtype.itemsize
        rows = self._claimed(thread, address, width)
        self._put(rows, values)

    def copy(self, thread: Array, address: Array, values: Array) -> None:
        """Start copies of `values`, uint32 `[n, words]`.

        Raises:
            Fault: As `store`.
        """
        width = 4 * values.shape[1]
        rows = self._claimed(thread, address, width)
        self._put(rows, values)
        self._places(self.flying, width)[rows] = True
        self.bytes.reshape(-1, width)[rows] = JUNK
        self.open.append(Copy(thread, address, values))

    def commit(self) -> None:
        """Make a group of the copies that were started."""
        self.groups.append(self.open)
        self.open = []

    def wait(self, groups: int) -> None:
        """All but the last `groups` groups land, for who asked for them."""
        while len(self.groups) > groups:
            for copy in self.groups.pop(0):
                width = 4 * copy.values.shape[1]
                rows = self._rows(copy.thread, copy.address, width)
                self._places(self.flying, width)[rows] = False
                self._places(self.wrote_at, width)[rows] = self.now
                self.bytes.view(np.uint32).reshape(-1, width // 4)[rows] = copy.values

    def ended(self) -> None:
        """The blocks end here.

        Raises:
            Fault: If copies are on their way.
        """
        if self.flying.any():
            raise Fault("in flight: copies that were never waited for")

    def part(self, blocks: Array) -> SharedMemory:
        """That of some of the blocks, ascending."""
        other = SharedMemory(len(blocks), self.threads, self.size, self.unit)
        count = len(self.bytes) // self.stride
        for name in ("bytes", "wrote_at", "writer", "last_read", "flying"):
            setattr(other, name, getattr(self, name).reshape(count, -1)[blocks].reshape(-1))
        warps = self.threads // WARP
        other.read_at = self.read_at.reshape(warps, count, -1)[:, blocks].reshape(warps, -1)
        other.now, other.block_barrier = self.now, self.block_barrier
        other.warp_barrier = self.warp_barrier
        moved = np.full(count, NEVER)
        moved[blocks] = np.arange(len(blocks))
        other.groups = [[_moved(c, moved, self.threads) for c in group] for group in self.groups]
        other.open = [_moved(c, moved, self.threads) for c in self.open]
        return other

    def _places(self, array: Array, width: int) -> Array:
        return array.reshape(-1, width // self.unit)

    def _rows(self, thread: Array, address: Array, width: int) -> Array:
        address = address.astype(np.int64)
        if (address % width).any():
            raise Fault(f"misaligned: access of {width} bytes in shared memory")
        if ((address < 0) | (address + width > self.size)).any():
            raise Fault(f"out of bounds: shared memory has {self.size} bytes")
        return (thread // self.threads * self.stride + address) // width

    def _claimed(self, thread: Array, address: Array, width: int) -> Array:
        """Rows for these threads to write, marked as theirs."""
        rows = self._rows(thread, address, width)
        if self._places(self.flying, width)[rows].any():
            raise Fault("in flight: write where a copy is on its way")
        wrote_at = self._places(self.wrote_at, width)[rows]
        self._no_race(thread, rows, width, wrote_at, "write over what another thread wrote")
        mine = thread % self.threads
        if (self._places(self.last_read, width)[rows] >= self.block_barrier).any():
            for warp, read_at in enumerate(self.read_at):
                recent = self._places(read_at, width)[rows] >= self.block_barrier
                if (recent.any(1) & (mine // WARP != warp)).any():
                    raise Fault("race: write over what another warp reads")
        self._places(self.writer, width)[rows] = mine[:, None]
        self._places(self.wrote_at, width)[rows] = self.now
        return rows

    def _put(self, rows: Array, values: Array) -> None:
        there = self.bytes.view(values.dtype).reshape(-1, values.shape[1])
        there[rows] = values
        if (there[rows] != values).any():
            raise Fault("race: two threads write to one place at once")

    def _no_race(self, thread: Array, rows: Array, width: int, wrote_at: Array, what: str) -> None:
        """No other thread wrote there since the last barrier with it."""
        recent = (wrote_at >= self.block_barrier).any(1)
        if not recent.any():
            return
        mine = thread[recent] % self.threads
        rows, wrote_at = rows[recent], wrote_at[recent]
        writer = self._places(self.writer, width)[rows]
        apart = (writer // WARP != mine[:, None] // WARP) | (wrote_at >= self.warp_barrier)
        racing = (wrote_at >= self.block_barrier) & (writer != mine[:, None]) & apart
        if racing.any():
            raise Fault(f"race: {what}, with no barrier between")


def _moved(copy: Copy, moved: Array, threads: int) -> Copy:
    """A copy's part for the blocks that have a new number."""
    block = moved[copy.thread // threads]
    kept = block != NEVER
    thread = block[kept] * threads + copy.thread[kept] % threads
    return Copy(thread, copy.address[kept], copy.values[kept])
