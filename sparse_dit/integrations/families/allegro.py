"""Allegro: video tokens alone, text by cross-attention."""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family


def _allegro(config: Any, arguments: Arguments) -> TokenLayout:
    _, _, frames, height, width = arguments["hidden_states"].shape
    return TokenLayout.video(
        frames // config.patch_size_t, height // config.patch_size, width // config.patch_size
    )


FAMILIES = {
    "AllegroTransformer3DModel": Family(r"transformer_blocks\.\d+\.attn1", _allegro),
}
