"""ERNIE-Image: image tokens, then text, padding last."""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family


def _ernie(config: Any, arguments: Arguments) -> TokenLayout:
    height, width = arguments["hidden_states"].shape[-2:]
    return TokenLayout.video(
        1,
        height // config.patch_size,
        width // config.patch_size,
        text_after=arguments["text_bth"].shape[1],
    )


def _heads(config: Any) -> tuple[int, int]:
    return config.num_attention_heads, config.hidden_size // config.num_attention_heads


FAMILIES = {
    "ErnieImageTransformer2DModel": Family(
        r"layers\.\d+\.self_attention", _ernie, heads=_heads, tested="transformer"
    ),
}
