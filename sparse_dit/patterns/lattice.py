"""Sets of cells of a 3-D lattice, and whether boxes of tokens touch them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Boxes


def summed(members: Tensor) -> Tensor:
    """Summed-area table of a bool lattice `[a, b, c]`: int64 `[a + 1, b + 1, c + 1]`."""
    table = members.long().cumsum(0).cumsum(1).cumsum(2)
    return torch.nn.functional.pad(table, (1, 0, 1, 0, 1, 0))


def any_inside(table: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Whether the cuboids `lo..hi` (inclusive, `[..., 3]`) hold a member of the summed lattice.

    Cuboids may reach beyond the lattice; what lies outside has no members.
    """
    limit = torch.tensor(table.shape) - 1
    a = lo.clamp_min(0).minimum(limit)
    b = (hi + 1).clamp_min(0).minimum(limit)
    total = torch.zeros(lo.shape[:-1], dtype=torch.int64)
    for corner in range(8):
        pick = [(b if corner >> axis & 1 else a)[..., axis] for axis in range(3)]
        total += table[tuple(pick)] * (1 if bin(corner).count("1") % 2 else -1)
    return (total > 0) & (a < b).all(-1)


def rescaled(boxes: Boxes, grid: tuple[int, int, int], lattice: tuple[int, int, int]) -> Boxes:
    """Boxes of tokens of a video of size `grid` as boxes of cells of a lattice stretched over it."""
    size, cells = torch.tensor(grid).clamp_min(1), torch.tensor(lattice)
    return Boxes(boxes.lo * cells // size, boxes.hi * cells // size)
