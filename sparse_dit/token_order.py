"""Where the tokens of a patched transformer lie: as its model puts them, or as its plan's heads want them."""

from __future__ import annotations

from collections import Counter

from .layout import Tile
from .patterns import Skip
from .plan import ComponentPlan

MODEL = "model"  # every layer's kernel sorts for each head
PLAN = "plan"  # once a forward, by the tile of most heads
TOKEN_ORDERS = (MODEL, PLAN)


def shared_tile(plan: ComponentPlan) -> Tile | str:
    """The tile of most of a plan's sparse heads, over layers and stages; or why there is none."""
    stages = [heads for stages in plan.layers.values() for heads in stages]
    patterns = [head.pattern for heads in stages for head in heads]
    if any(pattern.is_estimated for pattern in patterns):
        return "heads that find their blocks while generating sort tokens themselves"
    tiles = Counter(
        p.tile for p in patterns if not (p.computed.is_dense or isinstance(p.shape, Skip))
    )
    if not tiles:
        return "no head of the plan is sparse"
    (tile, _), *_ = tiles.most_common(1)
    return tile
