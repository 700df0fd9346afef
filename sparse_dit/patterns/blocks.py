"""A fixed block mask: for each tile of queries, the tiles of keys that it sees.

The blockified pattern of AdaSpa (https://arxiv.org/abs/2502.21079), chosen offline instead of at run
time; stretched over the video when its size differs from the calibration's.
"""

from __future__ import annotations

import hashlib
import math
from typing import Annotated

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from ..layout import Boxes, TileOrder
from .fields import CONFIG, Lattice
from .lattice import rescaled


@dataclass(frozen=True, config=CONFIG)
class Blocks:
    """A bool matrix over the cells of a lattice that is stretched over the video.

    Args:
        lattice: Cells along frames, rows and columns; `T` in all.
        bits: The matrix `[T, T]` (query cell, key cell), row-major, 8 to a byte, first bit lowest.
    """

    lattice: Lattice
    bits: Annotated[bytes, Field(strict=True)]

    @model_validator(mode="after")
    def _fits(self) -> Blocks:
        cells = math.prod(self.lattice)
        if cells > 1 << 14:
            raise ValueError(f"the lattice may have at most {1 << 14} cells, got {self.lattice}")
        if len(self.bits) != -(-cells * cells // 8):
            raise ValueError(
                f"a mask of {cells} x {cells} cells takes {-(-cells * cells // 8)} bytes, "
                f"got {len(self.bits)}"
            )
        return self

    @staticmethod
    def from_mask(mask: Tensor, lattice: tuple[int, int, int]) -> Blocks:
        """From a bool matrix `[T, T]`."""
        return Blocks(lattice, bytes(_pack(mask.flatten()).tolist()))

    @property
    def tensor_name(self) -> str:
        """Name of the mask in a plan's tensor file: it follows from the content."""
        return "blocks_" + hashlib.sha256(self.bits).hexdigest()[:16]

    def mask(self) -> Tensor:
        """The bool matrix `[T, T]`."""
        cells = math.prod(self.lattice)
        packed = torch.frombuffer(bytearray(self.bits), dtype=torch.uint8)
        bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
        return bits.flatten()[: cells * cells].view(cells, cells).bool()

    def covers(self, queries: Boxes, keys: Boxes, where: TileOrder) -> Tensor:
        """Whether a cell of each query box sees one of each key box, bool `[Q, K]`."""
        rows, columns = (self._members(boxes, where) for boxes in (queries, keys))
        return rows @ self.mask().float() @ columns.T > 0

    def _members(self, boxes: Boxes, where: TileOrder) -> Tensor:
        """Which cells each box touches, float `[n, T]`."""
        box = rescaled(boxes, where.grid, self.lattice)
        member = torch.ones(len(boxes), 1, dtype=torch.bool)
        for axis, count in enumerate(self.lattice):
            place = torch.arange(count)
            inside = (place >= box.lo[:, None, axis]) & (place <= box.hi[:, None, axis])
            member = (member[:, :, None] & inside[:, None, :]).flatten(1)
        return member.float()


def _pack(bits: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)
