"""Wan and its relatives: video tokens alone, text (and images) by cross-attention.

Frames of reference images that VACE and Animate put before the video are frames of the grid.
"""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family


def _wan(config: Any, arguments: Arguments) -> TokenLayout:
    grid = arguments["hidden_states"].shape[2:]  # [B, C, F, H, W]
    return TokenLayout.video(*(n // p for n, p in zip(grid, config.patch_size, strict=True)))


LAYERS = r"blocks\.\d+\.attn1"

FAMILIES = {
    "WanTransformer3DModel": Family(LAYERS, _wan, two_calls=True),
    "WanVACETransformer3DModel": Family(rf"(vace_)?{LAYERS}", _wan, two_calls=True),
    "WanAnimateTransformer3DModel": Family(LAYERS, _wan, two_calls=True),
    "SkyReelsV2Transformer3DModel": Family(LAYERS, _wan, two_calls=True),
    "ChronoEditTransformer3DModel": Family(LAYERS, _wan, two_calls=True),
}
