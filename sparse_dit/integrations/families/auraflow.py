"""AuraFlow: register tokens and text, then image tokens."""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family

REGISTERS = 8  # tokens that the host puts before the text


def _auraflow(config: Any, arguments: Arguments) -> TokenLayout:
    height, width = arguments["hidden_states"].shape[-2:]
    return TokenLayout.video(
        1,
        height // config.patch_size,
        width // config.patch_size,
        text_before=REGISTERS + arguments["encoder_hidden_states"].shape[1],
    )


FAMILIES = {
    "AuraFlowTransformer2DModel": Family(
        r"(joint|single)_transformer_blocks\.\d+\.attn",
        _auraflow,
        max_timestep=1.0,
        tested="transformer",
    ),
}
