"""CogView 4: text tokens, then image tokens."""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family


def _cogview4(config: Any, arguments: Arguments) -> TokenLayout:
    height, width = arguments["hidden_states"].shape[-2:]
    return TokenLayout.video(
        1,
        height // config.patch_size,
        width // config.patch_size,
        text_before=arguments["encoder_hidden_states"].shape[1],
    )


FAMILIES = {
    "CogView4Transformer2DModel": Family(r"transformer_blocks\.\d+\.attn1", _cogview4),
}
