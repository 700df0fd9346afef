"""Each token of the grid sees the tokens near its own frame, row and column.

The neighbourhood of NATTEN (https://arxiv.org/abs/2504.16922), without its clamping at borders; with
whole rows and columns it is the "spatial head" of Sparse VideoGen (https://arxiv.org/abs/2502.01776).
"""

from __future__ import annotations

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from ..layout import Boxes, TileOrder
from .fields import CONFIG, Extent, extent


@dataclass(frozen=True, config=CONFIG)
class Window:
    """A token sees those at most this far away on every axis.

    Args:
        frames, rows, columns: Distance on each side: an int, `(alpha, beta)` for
            `alpha + beta * axis length`, or None for the whole axis.
    """

    frames: Extent = None
    rows: Extent = None
    columns: Extent = None

    def covers(self, queries: Boxes, keys: Boxes, where: TileOrder) -> Tensor:
        """Whether a token of each query box sees one of each key box, bool `[Q, K]`."""
        result = torch.ones(len(queries), len(keys), dtype=torch.bool)
        for axis, value in enumerate((self.frames, self.rows, self.columns)):
            before = queries.lo[:, None, axis] - keys.hi[None, :, axis]
            after = keys.lo[None, :, axis] - queries.hi[:, None, axis]
            result &= torch.maximum(before, after) <= extent(value, where.grid[axis])
        return result
