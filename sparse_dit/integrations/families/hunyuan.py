"""HunyuanVideo: video tokens, then padded text tokens."""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family


def _hunyuan_video(config: Any, arguments: Arguments) -> TokenLayout:
    _, _, frames, height, width = arguments["hidden_states"].shape
    return TokenLayout.video(
        frames // config.patch_size_t,
        height // config.patch_size,
        width // config.patch_size,
        text_after=arguments["encoder_hidden_states"].shape[1],
    )


FAMILIES = {
    "HunyuanVideoTransformer3DModel": Family(
        r"(single_)?transformer_blocks\.\d+\.attn", _hunyuan_video
    ),
}
