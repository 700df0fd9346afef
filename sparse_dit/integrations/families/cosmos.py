"""Cosmos: video tokens alone, text by cross-attention.

Cosmos 2 and 2.5 pass sigma / (sigma + 1) as timestep. Cosmos 1 passes a quarter of sigma's logarithm: where
that isn't within 0 and 1, no noise level of a plan covers it, and dense attention runs.
"""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family


def _cosmos(config: Any, arguments: Arguments) -> TokenLayout:
    grid = arguments["hidden_states"].shape[2:]  # [B, C, F, H, W]
    return TokenLayout.video(*(n // p for n, p in zip(grid, config.patch_size, strict=True)))


FAMILIES = {
    "CosmosTransformer3DModel": Family(
        r"transformer_blocks\.\d+\.attn1",
        _cosmos,
        max_timestep=1.0,
        tested="transformer",
        two_calls=True,
    ),
}
