"""All queries see the same keys: vertical stripes of the attention map.

The "vertical stripe" mode of Sparse-vDiT (https://arxiv.org/abs/2506.03065), at fixed places of the
video instead of fixed token ids, so that it moves to other sizes.
"""

from __future__ import annotations

import math

import torch
from pydantic import model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from ..layout import Boxes, TileOrder
from .fields import CONFIG, Distance, Lattice
from .lattice import any_inside, rescaled, summed


@dataclass(frozen=True, config=CONFIG)
class Vertical:
    """Keys in the chosen cells of a lattice that is stretched over the video.

    Args:
        lattice: Cells along frames, rows and columns.
        cells: Chosen cells, raster index in the lattice.
    """

    lattice: Lattice
    cells: tuple[Distance, ...]

    @model_validator(mode="after")
    def _inside(self) -> Vertical:
        if math.prod(self.lattice) > 1 << 22:
            raise ValueError(f"the lattice may have at most {1 << 22} cells, got {self.lattice}")
        if self.cells and max(self.cells) >= math.prod(self.lattice):
            raise ValueError(f"cell {max(self.cells)} is outside of the lattice {self.lattice}")
        return self

    def covers(self, queries: Boxes, keys: Boxes, where: TileOrder) -> Tensor:
        """Whether each key box touches a chosen cell, bool `[Q, K]`, the same for all queries."""
        members = torch.zeros(math.prod(self.lattice), dtype=torch.bool)
        members[list(self.cells)] = True
        box = rescaled(keys, where.grid, self.lattice)
        seen = any_inside(summed(members.view(self.lattice)), box.lo, box.hi)
        return seen.expand(len(queries), -1)
