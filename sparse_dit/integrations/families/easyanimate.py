"""EasyAnimate: text tokens of one or two encoders, then video tokens."""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family


def _easyanimate(config: Any, arguments: Arguments) -> TokenLayout:
    _, _, frames, height, width = arguments["hidden_states"].shape
    texts = [arguments.get(n) for n in ("encoder_hidden_states", "encoder_hidden_states_t5")]
    return TokenLayout.video(
        frames,
        height // config.patch_size,
        width // config.patch_size,
        text_before=sum(text.shape[1] for text in texts if text is not None),
    )


FAMILIES = {
    "EasyAnimateTransformer3DModel": Family(r"transformer_blocks\.\d+\.attn1", _easyanimate),
}
