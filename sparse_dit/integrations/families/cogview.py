"""CogView 3 and 4, GLM-Image: text tokens, then image tokens."""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from ..arrangement import Arrangement, text_bias, version_of
from .family import Arguments, Family, warn_of_other_keys


def _cogview4(config: Any, arguments: Arguments) -> TokenLayout:
    height, width = arguments["hidden_states"].shape[-2:]
    return TokenLayout.video(
        1,
        height // config.patch_size,
        width // config.patch_size,
        text_before=arguments["encoder_hidden_states"].shape[1],
    )


def _glm(config: Any, arguments: Arguments) -> TokenLayout | None:
    caches = arguments.get("kv_caches")
    if caches is not None and caches[0].mode == "read":
        warn_of_other_keys("GLM-Image that edits images")
        return None
    return _cogview4(config, arguments)


def _biased(config: Any, arguments: Arguments) -> Arrangement | None:
    mask, layout = arguments.get("attention_mask"), _glm(config, arguments)
    return None if mask is None or layout is None else text_bias(mask, version_of(mask), layout)


LAYERS = r"transformer_blocks\.\d+\.attn1"

FAMILIES = {
    "CogView3PlusTransformer2DModel": Family(LAYERS, _cogview4, tested="transformer"),
    "CogView4Transformer2DModel": Family(LAYERS, _cogview4, arrange=_biased, two_calls=True),
    "GlmImageTransformer2DModel": Family(
        LAYERS, _glm, arrange=_biased, two_calls=True, tested="transformer"
    ),
}
