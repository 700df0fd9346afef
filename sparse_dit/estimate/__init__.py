"""Indices estimated from a call's own queries and keys, for the prefill of causal language models.

`patterns/estimated.py` names what can be estimated, `estimated.py` makes the index. See `docs/estimates.md`.
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

__all__ = [
    "Budget",
    "ByKey",
    "ByQuery",
    "Dense",
    "Grid",
    "OwnPart",
    "PooledBlocks",
    "Share",
    "SinkWindow",
    "VerticalSlash",
    "estimated_index",
    "sighted",
]
