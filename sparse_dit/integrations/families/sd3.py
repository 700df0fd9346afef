"""Stable Diffusion 3: image tokens, then text; some layers have a second attention, image alone."""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family


def _sd3(config: Any, arguments: Arguments) -> TokenLayout:
    height, width = arguments["hidden_states"].shape[-2:]
    return TokenLayout.video(
        1,
        height // config.patch_size,
        width // config.patch_size,
        text_after=arguments["encoder_hidden_states"].shape[1],
    )


FAMILIES = {
    "SD3Transformer2DModel": Family(
        r"transformer_blocks\.\d+\.attn2?", _sd3, image_only=r"transformer_blocks\.\d+\.attn2"
    ),
}
