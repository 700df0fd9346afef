"""Cosmos: video tokens alone, text by cross-attention.

Noise levels are sigma / (sigma + 1): Cosmos 2 and 2.5 pass that as timestep, Cosmos 1 a quarter of sigma's
logarithm (`precondition_noise` of its scheduler). It alone has learnable positions.
"""

from __future__ import annotations

import math
from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family


def _cosmos(config: Any, arguments: Arguments) -> TokenLayout:
    grid = arguments["hidden_states"].shape[2:]  # [B, C, F, H, W]
    return TokenLayout.video(*(n // p for n, p in zip(grid, config.patch_size, strict=True)))


def _noise(config: Any, timestep: float) -> float:
    if config.extra_pos_embed_type is None:
        return timestep
    return 1 / (1 + math.exp(-4 * timestep))


FAMILIES = {
    "CosmosTransformer3DModel": Family(
        r"transformer_blocks\.\d+\.attn1",
        _cosmos,
        noise=_noise,
        two_calls=True,
    ),
}
