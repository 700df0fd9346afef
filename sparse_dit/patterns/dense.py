"""Every token sees every token."""

from __future__ import annotations

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from ..layout import Boxes, TileOrder
from .fields import CONFIG


@dataclass(frozen=True, config=CONFIG)
class Dense:
    """Full attention; it has no parameters."""

    def covers(self, queries: Boxes, keys: Boxes, where: TileOrder) -> Tensor:
        """All true, bool `[len(queries), len(keys)]`."""
        return torch.ones(len(queries), len(keys), dtype=torch.bool)
