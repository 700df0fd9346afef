"""A SparseIndex as the kernel reads it: one int32 tensor, laid out as `csrc/abi.h` says."""

from __future__ import annotations

import torch
from torch import Tensor

from ...index import PatternIndex, SparseIndex
from .library import ABI_VERSION

MAGIC = 0x53444954
HEADER_WORDS, ENTRY_WORDS = 6, 12
KEY = "packed for the CPU kernel"


def packed_index(index: SparseIndex) -> Tensor:
    """int32 `[words]`, made once for an index.

    Raises:
        ValueError: If it is so large that its places don't fit into 32 bits.
    """
    tensor = index.cache.get(KEY)
    if tensor is None:
        tensor = pack_index(index)
        if not torch.compiler.is_compiling():  # a traced tensor has no place in a cache
            index.cache[KEY] = tensor
    return tensor


def pack_index(index: SparseIndex) -> Tensor:
    """The same as `packed_index`, but made anew."""
    arrays = _Arrays(HEADER_WORDS + ENTRY_WORDS * len(index.entries) + index.num_heads)
    words = [MAGIC, ABI_VERSION, index.num_heads, len(index.entries)]
    words += [index.num_queries, index.num_keys]
    for entry in index.entries:
        words += _entry(entry, arrays)
    words += index.head_to_pattern
    if arrays.end >= 1 << 31:
        raise ValueError(f"an index must be smaller than 2**31 words, got {arrays.end}")
    device = index.entries[0].q_offsets.device
    head = torch.tensor(words, dtype=torch.int32, device=device)
    return torch.cat([head, *arrays.parts])


def _entry(entry: PatternIndex, arrays: _Arrays) -> list[int]:
    """The words of one `struct Entry`."""
    far = entry.far
    words = [
        arrays.place(entry.q_order),
        arrays.place(entry.k_order),
        arrays.place(entry.q_offsets),
        len(entry.q_offsets) - 1,
        arrays.place(entry.run_offsets),
        arrays.place(entry.runs),
        len(entry.runs),
    ]
    if far is None:
        return [*words, -1, 0, -1, -1, 0]
    return [
        *words,
        arrays.place(far.cell_offsets),
        len(far.cell_offsets) - 1,
        arrays.place(far.run_offsets),
        arrays.place(far.runs),
        len(far.runs),
    ]


class _Arrays:
    """Arrays one after another; one that entries share lies there once."""

    def __init__(self, start: int) -> None:
        self.end = start
        self.parts: list[Tensor] = []
        self.places: dict[int, int] = {}  # of the arrays of one index, by their id

    def place(self, array: Tensor | None) -> int:
        """Append an array and say where it lies, in words from the start; -1 for None."""
        if array is None:
            return -1
        if id(array) not in self.places:
            self.places[id(array)] = self.end
            self.end += array.numel()
            self.parts.append(array.reshape(-1))
        return self.places[id(array)]
