"""The patterns an attention head can follow; one file each.

A shape says which tokens see which (`shape.covers(query boxes, key boxes, tile order)`), a `Pattern`
adds how tokens are ordered and grouped and what stands for the rest. To add one: a file, and a line in
`PATTERNS` (in `pattern.py`).
"""

from ..curve import Curve
from .blocks import Blocks
from .blockwise import Above, Antidiagonal, Mass, Pooled
from .cluster import Cluster
from .dense import Dense
from .estimated import (
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
from .pattern import BLOCKWISE, CAUSAL, ESTIMATED, GEOMETRY, PATTERNS, Pattern
from .skip import Skip
from .stencil import Stencil
from .stripe import Stripe
from .tile import SlidingTile
from .union import Union
from .vertical import Vertical
from .window import Window

__all__ = [
    "BLOCKWISE",
    "CAUSAL",
    "ESTIMATED",
    "GEOMETRY",
    "PATTERNS",
    "Above",
    "Antidiagonal",
    "Blocks",
    "Budget",
    "ByKey",
    "ByQuery",
    "Cluster",
    "Curve",
    "Dense",
    "Grid",
    "Mass",
    "OwnPart",
    "Pattern",
    "Pooled",
    "PooledBlocks",
    "Share",
    "SinkWindow",
    "Skip",
    "SlidingTile",
    "Stencil",
    "Stripe",
    "Union",
    "Vertical",
    "VerticalSlash",
    "Window",
]
