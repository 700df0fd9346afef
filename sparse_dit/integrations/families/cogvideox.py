"""CogVideoX: text tokens, then video tokens."""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family


def _cogvideox(config: Any, arguments: Arguments) -> TokenLayout:
    _, frames, _, height, width = arguments["hidden_states"].shape
    return TokenLayout.video(
        frames // (config.patch_size_t or 1),
        height // config.patch_size,
        width // config.patch_size,
        text_before=arguments["encoder_hidden_states"].shape[1],
    )


FAMILIES = {
    "CogVideoXTransformer3DModel": Family(r"transformer_blocks\.\d+\.attn1", _cogvideox),
}
