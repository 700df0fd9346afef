"""HunyuanImage: image tokens, then text of one or two encoders, padding last."""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family


def _hunyuan_image(config: Any, arguments: Arguments) -> TokenLayout:
    sizes = arguments["hidden_states"].shape[2:]
    grid = [n // p for n, p in zip(sizes, config.patch_size, strict=True)]
    frames = grid.pop(0) if len(grid) == 3 else 1
    text = arguments["encoder_hidden_states"].shape[1]
    second = arguments.get("encoder_hidden_states_2")
    if second is not None and config.text_embed_2_dim is not None:
        text += second.shape[1]
    return TokenLayout.video(frames, *grid, text_after=text)


FAMILIES = {
    "HunyuanImageTransformer2DModel": Family(
        r"(single_)?transformer_blocks\.\d+\.attn", _hunyuan_image
    ),
}
