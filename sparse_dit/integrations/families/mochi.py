"""Mochi: video tokens, then the valid text tokens of one item; a layer attends item by item."""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family


def _mochi(config: Any, arguments: Arguments) -> TokenLayout:
    _, _, frames, height, width = arguments["hidden_states"].shape
    return TokenLayout.video(
        frames,
        height // config.patch_size,
        width // config.patch_size,
        text_after=arguments["encoder_hidden_states"].shape[1],
    )


FAMILIES = {
    "MochiTransformer3DModel": Family(
        r"transformer_blocks\.\d+\.attn1",
        _mochi,
        max_timestep=0.0,  # its scheduler inverts noise levels
        clean_timestep=1000.0,
        unpadded=True,
    ),
}
