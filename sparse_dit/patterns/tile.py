"""Each tile sees a 3-D window of tiles around its own, clamped to the video.

Sliding Tile Attention, https://arxiv.org/abs/2502.04507.
"""

from __future__ import annotations

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from ..layout import Boxes, TileOrder
from .fields import CONFIG, Count


@dataclass(frozen=True, config=CONFIG)
class SlidingTile:
    """A window of this many tiles; at the borders it is shifted inwards, never cut.

    Args:
        frames, rows, columns: Window size in tiles; None for the whole axis.
    """

    frames: Count | None = None
    rows: Count | None = None
    columns: Count | None = None

    def covers(self, queries: Boxes, keys: Boxes, where: TileOrder) -> Tensor:
        """Whether a token of each query box sees one of each key box, bool `[Q, K]`."""
        result = torch.ones(len(queries), len(keys), dtype=torch.bool)
        for axis, count in enumerate((self.frames, self.rows, self.columns)):
            size = where.tile[axis]
            total = -(-where.grid[axis] // size)
            if count is None or count >= total:
                continue
            first = (queries.lo[:, None, axis] // size - count // 2).clamp(0, total - count)
            last = (queries.hi[:, None, axis] // size - count // 2).clamp(0, total - count)
            result &= keys.hi[None, :, axis] // size >= first
            result &= keys.lo[None, :, axis] // size < last + count
        return result
