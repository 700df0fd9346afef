"""Global memory: each tensor lies alone, and only what belongs to it can be reached.

Elements of a view count, not its storage: what lies between the rows of a slice is outside.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import torch
from numpy import ndarray as Array
from torch import Tensor

from .arithmetic import BITS
from .program import Fault

APART = 1 << 22  # bytes between tensors, at least
READ, WRITE = 1, 2


class GlobalMemory:
    """Copies of tensors at addresses of their own.

    Args:
        tensors: Those to be had, and what may be done with each (READ, WRITE).
    """

    def __init__(self, tensors: list[tuple[Tensor, int]]):
        self._placed: list[tuple[Tensor, int, int]] = []
        place = APART
        for tensor, rights in tensors:
            self._placed.append((tensor, rights, place + tensor.data_ptr() % 256))
            place += -(-_extent(tensor) // APART) * APART + APART
        self.bytes = _zeros(place, np.uint8)
        self._rights = _zeros(place, np.uint8)
        self._owner = _zeros(place, np.int16)  # block that wrote it, from 1 on
        for tensor, rights, start in self._placed:
            size = _extent(tensor)
            self.bytes[start : start + size] = _host(tensor, size)
            self._rights[start : start + size] = rights * _elements(tensor)

    def addresses(self) -> list[int]:
        """Where the tensors lie, in their order."""
        return [start for _, _, start in self._placed]

    def relocate(self, table: Tensor) -> None:
        """Replace addresses of these tensors on the host, in the copy of an int64 table."""
        known = {t.data_ptr(): start for t, _, start in self._placed if t.numel()}
        start = next(s for t, _, s in self._placed if t is table)
        place = slice(start // 8, start // 8 + table.numel())
        numbers = self.bytes.view(np.int64)
        numbers[place] = [known.get(x, x) for x in numbers[place].tolist()]

    def written(self) -> None:
        """Copy what may be written back to the host.

        Raises:
            Fault: If some of it was not.
        """
        for tensor, rights, start in self._placed:
            size = _extent(tensor)
            if (
                rights == WRITE
                and (self._owner[start : start + size][_elements(tensor)] == 0).any()
            ):
                raise Fault(f"unwritten: part of an output of shape {list(tensor.shape)}")
            if rights & WRITE:
                _host(tensor, size)[:] = self.bytes[start : start + size]

    def load(self, address: Array, width: int) -> Array:
        """uint `[n, words]` from n addresses of `width` bytes; words of 4 bytes, or of all if fewer.

        Raises:
            Fault: If any is outside of what may be read.
        """
        rows = self._rows(address, width, READ)
        word = BITS[8 * min(width, 4)]
        return self.bytes.view(word).reshape(-1, max(1, width // 4))[rows]

    def store(self, address: Array, values: Array, block: Array) -> None:
        """Store `values` `[n, words]` of `block` `[n]`.

        Raises:
            Fault: If any is outside of what may be written, or another block's.
        """
        width = values.shape[1] * values.dtype.itemsize
        rows = self._rows(address, width, WRITE)
        owner = self._owner.reshape(-1, width)
        before = owner[rows]
        owner[rows] = mine = block[:, None] + 1
        if ((before != 0) & (before != mine)).any() or (owner[rows] != mine).any():
            raise Fault("race: two blocks write the same")
        self.bytes.view(values.dtype).reshape(-1, values.shape[1])[rows] = values

    def add(self, address: Array, values: Array) -> Array:
        """Add float32 `values` `[n]` atomically; what was there before."""
        rows = self._rows(address, 4, READ | WRITE)
        there = self.bytes.view(np.float32)
        before = there[rows]
        np.add.at(there, rows, values)
        return before

    def _rows(self, address: Array, width: int, wanted: int) -> Array:
        place = address.astype(np.int64)
        if (place % width).any():
            raise Fault(f"misaligned: access of {width} bytes in global memory")
        inside = (place >= 0) & (place < len(self.bytes))
        rows = np.where(inside, place, 0) // width
        granted = (self._rights.reshape(-1, width)[rows] & wanted == wanted).all(1)
        if not granted.all():
            raise Fault(f"out of bounds: {self._where(int(place[~granted][0]), wanted)}")
        return rows

    def _where(self, place: int, wanted: int) -> str:
        """An address in words."""
        action = {READ: "read", WRITE: "write", READ | WRITE: "add to"}[wanted]
        before = [(s, t) for t, _, s in self._placed if s <= place]
        if not before:
            return f"{action} at {place:#x}, before all tensors"
        start, tensor = max(before, key=lambda x: x[0])
        kind = f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}"
        return f"{action} at byte {place - start} of {_extent(tensor)} of a tensor of {kind}"


def _zeros(size: int, kind: type) -> Array:
    """Memory that is provided only where it is touched, by small pages."""
    pages = mmap.mmap(-1, size * np.dtype(kind).itemsize)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, kind)


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the last."""
    if tensor.numel() == 0:
        return 0
    steps = ((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (sum(steps) + 1) * tensor.element_size()


def _host(tensor: Tensor, size: int) -> Array:
    if size == 0:
        return np.zeros(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(tensor.data_ptr()))


def _elements(tensor: Tensor) -> Array:
    """bool: which bytes of the extent belong to elements."""
    mask = torch.zeros(_extent(tensor) // tensor.element_size(), dtype=torch.bool)
    if tensor.numel():
        mask.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return mask.repeat_interleave(tensor.element_size()).numpy()
