"""Wan: video tokens alone, text by cross-attention."""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family


def _wan(config: Any, arguments: Arguments) -> TokenLayout:
    grid = arguments["hidden_states"].shape[2:]  # [B, C, F, H, W]
    return TokenLayout.video(*(n // p for n, p in zip(grid, config.patch_size, strict=True)))


FAMILIES = {
    "WanTransformer3DModel": Family(r"blocks\.\d+\.attn1", _wan),
}
