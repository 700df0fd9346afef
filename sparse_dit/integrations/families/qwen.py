"""Qwen-Image: text tokens, then image tokens, then those of the images that are edited."""

from __future__ import annotations

from typing import Any

from ...layout import Segment, TokenLayout
from ..arrangement import Arrangement, padding_last, version_of
from .family import Arguments, Family


def _qwen(config: Any, arguments: Arguments) -> TokenLayout | None:
    shapes = arguments.get("img_shapes")
    if not shapes or any(item != shapes[0] for item in shapes):  # one layout holds for a batch
        return None
    images = [shapes[0]] if isinstance(shapes[0], tuple) else shapes[0]
    first, *others = (Segment.grid(*(int(n) for n in shape)) for shape in images)
    parts = [Segment.global_(arguments["encoder_hidden_states"].shape[1]), first]
    return TokenLayout((*parts, *(Segment.global_(image.length) for image in others)))


def _padded(config: Any, arguments: Arguments) -> Arrangement | None:
    """Padding lies between text and image: move it to the end."""
    mask, layout = arguments.get("encoder_hidden_states_mask"), _qwen(config, arguments)
    if mask is None or layout is None:
        return None
    return padding_last(mask, version_of(mask), layout)


FAMILIES = {
    "QwenImageTransformer2DModel": Family(
        r"transformer_blocks\.\d+\.attn", _qwen, max_timestep=1.0, arrange=_padded, two_calls=True
    ),
}
