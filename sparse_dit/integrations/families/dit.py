"""DiT and Hunyuan-DiT: image tokens alone; a class, or text by cross-attention."""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family


def _image(config: Any, arguments: Arguments) -> TokenLayout:
    height, width = arguments["hidden_states"].shape[-2:]
    return TokenLayout.video(1, height // config.patch_size, width // config.patch_size)


FAMILIES = {
    "DiTTransformer2DModel": Family(
        r"transformer_blocks\.\d+\.attn1", _image, tested="transformer"
    ),
    "HunyuanDiT2DModel": Family(r"blocks\.\d+\.attn1", _image, tested="transformer"),
}
