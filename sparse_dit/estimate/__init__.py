"""Indices estimated from a call's own queries and keys, for the prefill of causal language models.

`shapes.py` names what can be estimated, `estimated.py` makes the index. See `docs/estimates.md`.
"""

from __future__ import annotations

from ..patterns.dense import Dense
from .estimated import estimated_index
from .shapes import Budget, PooledBlocks, Share, SinkWindow, VerticalSlash

__all__ = [
    "Budget",
    "Dense",
    "PooledBlocks",
    "Share",
    "SinkWindow",
    "VerticalSlash",
    "estimated_index",
]
