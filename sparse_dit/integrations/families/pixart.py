"""PixArt: image tokens alone, text by cross-attention."""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family


def _pixart(config: Any, arguments: Arguments) -> TokenLayout:
    height, width = arguments["hidden_states"].shape[-2:]
    return TokenLayout.video(1, height // config.patch_size, width // config.patch_size)


FAMILIES = {
    "PixArtTransformer2DModel": Family(r"transformer_blocks\.\d+\.attn1", _pixart),
}
