"""CogVideoX and ConsisID: text tokens, then video tokens."""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family
from .way import Axis, Way


def _cogvideox(config: Any, arguments: Arguments) -> TokenLayout:
    _, frames, _, height, width = arguments["hidden_states"].shape
    return TokenLayout.video(
        frames // (config.get("patch_size_t") or 1),  # version 1.5 alone has it
        height // config.patch_size,
        width // config.patch_size,
        text_before=arguments["encoder_hidden_states"].shape[1],
    )


LAYERS = r"transformer_blocks\.\d+\.attn1"

WAY = Way(
    {
        "": {"image_rotary_emb": Axis(0, 2)},
        "transformer_blocks.0": {"hidden_states": Axis(1, 3)},
    },
    back={"proj_out": Axis(1, 3)},
)

FAMILIES = {
    "CogVideoXTransformer3DModel": Family(LAYERS, _cogvideox, way=WAY),
    "ConsisIDTransformer3DModel": Family(LAYERS, _cogvideox),
}
