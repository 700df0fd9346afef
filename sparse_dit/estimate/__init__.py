"""Indices estimated from a call's own queries and keys.

For the prefill of causal language models `patterns/estimated.py` names what can be estimated, and
`estimated.py` makes the index. For the grids of videos and images those are `patterns/blockwise.py` and
`blockwise.py`, and `kept.py` keeps what was found for later steps. See `docs/estimates.md`.
"""

from __future__ import annotations

from ..patterns.dense import Dense
from ..patterns.estimated import (
    Budget,
    ByKey,
    ByQuery,
    Grid,
    OwnPart,
    PooledBlocks,
    Share,
    SinkWindow,
    VerticalSlash,
)
from .estimated import estimated_index, sighted
from .kept import Estimates

__all__ = [
    "Budget",
    "ByKey",
    "ByQuery",
    "Dense",
    "Estimates",
    "Grid",
    "OwnPart",
    "PooledBlocks",
    "Share",
    "SinkWindow",
    "VerticalSlash",
    "estimated_index",
    "sighted",
]
