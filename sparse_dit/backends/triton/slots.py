"""Where pooled keys lie in the memory that the kernel which pools writes."""

from __future__ import annotations

import torch
from torch import Tensor

from .tables import SLOT_FIELDS


class Slots:
    """Pooled keys of pairs of a pattern and a key head; before each pair's comes one of no tokens.

    Args:
        repeat: Query heads to a key head.

    Attributes:
        pooled_rows: Pooled keys of all pairs, with those of no tokens.
        cells: Most cells of a pattern.
    """

    def __init__(self, repeat: int) -> None:
        self._repeat = repeat
        self._first: dict[tuple[int, int], int] = {}
        self._rows: list[list[int]] = []
        self.pooled_rows = self.cells = 0

    def of(self, tables: object, head: int, keys: Tensor, offsets: Tensor) -> int:
        """The first pooled key of a head; 0 if it has none.

        Args:
            tables: What heads of one pattern share, kept by the caller.
            head: The query head.
            keys: int32, the key token at each sorted position, kept by the caller.
            offsets: int32 `[C + 1]`, where cells start, kept by the caller; or empty.
        """
        cells, kv_head = len(offsets) - 1, head // self._repeat
        if cells < 1:
            return 0
        first = self._first.get((id(tables), kv_head))
        if first is None:
            self.pooled_rows += 1  # that of no cell, for -1 in the tables
            first = self._first[id(tables), kv_head] = self.pooled_rows
            self._rows.append([keys.data_ptr(), offsets.data_ptr(), cells, first, kv_head])
            self.pooled_rows += cells
            self.cells = max(self.cells, cells)
        return first

    def table(self, device: torch.device) -> Tensor:
        """int64 `[pairs, SLOT_FIELDS]`, as the kernel reads it."""
        return torch.tensor(self._rows, dtype=torch.int64).view(-1, SLOT_FIELDS).to(device)
