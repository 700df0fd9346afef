"""Helios: tokens of earlier video, coarser the longer ago, then video tokens; text by cross-attention.

The earlier video is no part of the video's grid, so it counts as text does: all see it, it sees all.
"""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family

# kernels of the host's patch embeddings, in patches; it pads latents to their multiple
HISTORY = {
    "latents_history_short": 1,
    "latents_history_mid": 2,
    "latents_history_long": 4,
}


def _helios(config: Any, arguments: Arguments) -> TokenLayout:
    grid = arguments["hidden_states"].shape[2:]  # [B, C, F, H, W]
    history = 0
    for name, times in HISTORY.items():
        latents, indices = arguments.get(name), arguments.get(f"indices_{name}")
        if latents is not None and indices is not None:
            frames, height, width = (
                -(-n // (p * times))
                for n, p in zip(latents.shape[2:], config.patch_size, strict=True)
            )
            history += frames * height * width
    video = (n // p for n, p in zip(grid, config.patch_size, strict=True))
    return TokenLayout.video(*video, text_before=history)


FAMILIES = {
    "HeliosTransformer3DModel": Family(r"blocks\.\d+\.attn1", _helios),
}
