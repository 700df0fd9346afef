"""Wan and its relatives: video tokens alone, text (and images) by cross-attention.

Frames of reference images that VACE and Animate put before the video are frames of the grid.
"""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family
from .way import Way


def _wan(config: Any, arguments: Arguments) -> TokenLayout:
    grid = arguments["hidden_states"].shape[2:]  # [B, C, F, H, W]
    return TokenLayout.video(*(n // p for n, p in zip(grid, config.patch_size, strict=True)))


LAYERS = r"blocks\.\d+\.attn1"

FAMILIES = {
    "WanTransformer3DModel": Family(LAYERS, _wan, two_calls=True, way=Way()),
    "WanVACETransformer3DModel": Family(
        rf"(vace_)?{LAYERS}",
        _wan,
        two_calls=True,
        way="a control video in the model's own order is added in its layers",
    ),
    "WanAnimateTransformer3DModel": Family(
        LAYERS, _wan, two_calls=True, way="its layers add a face to the tokens of each frame"
    ),
    "SkyReelsV2Transformer3DModel": Family(
        LAYERS, _wan, two_calls=True, way="its layers may have a mask in the order of frames"
    ),
    "ChronoEditTransformer3DModel": Family(LAYERS, _wan, two_calls=True, way=Way()),
}
