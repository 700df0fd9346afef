"""Video tokens see nothing: the head's output is zero (with a far field: the pooled average).

The "skip" mode of Sparse-vDiT, https://arxiv.org/abs/2506.03065.
"""

from __future__ import annotations

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from ..layout import Boxes, TileOrder
from .fields import CONFIG


@dataclass(frozen=True, config=CONFIG)
class Skip:
    """No exact attention; it has no parameters."""

    def covers(self, queries: Boxes, keys: Boxes, where: TileOrder) -> Tensor:
        """All false, bool `[len(queries), len(keys)]`."""
        return torch.zeros(len(queries), len(keys), dtype=torch.bool)
