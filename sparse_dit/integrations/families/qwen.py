"""Qwen-Image: text tokens, then image tokens, then those of the images that are edited."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...layout import Segment, TokenLayout
from ..arrangement import Arrangement, image_first
from .family import Arguments, Family


def _qwen(config: Any, arguments: Arguments) -> TokenLayout | None:
    shapes = arguments.get("img_shapes")
    if not shapes or any(item != shapes[0] for item in shapes):  # one layout holds for a batch
        return None
    images = [shapes[0]] if isinstance(shapes[0], tuple) else shapes[0]
    first, *others = (Segment.video(*(int(n) for n in shape)) for shape in images)
    parts = [Segment.text(arguments["encoder_hidden_states"].shape[1]), first]
    return TokenLayout((*parts, *(Segment.text(image.length) for image in others)))


def _padded(config: Any, arguments: Arguments) -> Arrangement | None:
    """Padding lies between text and image: move it to the end."""
    mask, layout = arguments.get("encoder_hidden_states_mask"), _qwen(config, arguments)
    if mask is None or layout is None:
        return None
    return _image_first(mask, mask._version, layout)


@functools.lru_cache(maxsize=4)
def _image_first(mask: Tensor, _version: int, layout: TokenLayout) -> Arrangement:
    """Cached by the tensor's identity and version: a pipeline passes one tensor to all steps."""
    others = mask.new_ones(len(mask), layout.seq_len - mask.shape[1], dtype=torch.bool)
    return image_first(
        torch.cat([mask.bool(), others], 1), mask.shape[1], TokenLayout(layout.segments[1:2])
    )


FAMILIES = {
    "QwenImageTransformer2DModel": Family(
        r"transformer_blocks\.\d+\.attn", _qwen, max_timestep=1.0, arrange=_padded
    ),
}
