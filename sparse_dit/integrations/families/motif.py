"""Motif-Video: video tokens, then tokens of the first image, then padded text tokens.

Its decoder layers attend over two copies of the video instead, which is no layout: they run dense.
"""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family


def _motif(config: Any, arguments: Arguments) -> TokenLayout:
    _, _, frames, height, width = arguments["hidden_states"].shape
    others = [arguments.get(name) for name in ("image_embeds", "encoder_hidden_states")]
    return TokenLayout.video(
        frames // config.patch_size_t,
        height // config.patch_size,
        width // config.patch_size,
        text_after=sum(tokens.shape[1] for tokens in others if tokens is not None),
    )


FAMILIES = {
    "MotifVideoTransformer3DModel": Family(r"(single_)?transformer_blocks\.\d+\.attn", _motif),
}
