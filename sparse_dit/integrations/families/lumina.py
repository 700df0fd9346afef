"""Lumina 2: each item's valid text tokens, then its image tokens, then padding."""

from __future__ import annotations

from typing import Any

import torch

from ...layout import Segment, TokenLayout
from ..arrangement import Arrangement, image_first
from .family import Arguments, Family


def _lumina2(config: Any, arguments: Arguments) -> TokenLayout:
    return TokenLayout((Segment.text(_longest(arguments)), *_image(config, arguments).segments))


def _padded(config: Any, arguments: Arguments) -> Arrangement | None:
    """Images start at different places if texts differ in length: move them to the front."""
    lengths = arguments["encoder_attention_mask"].sum(1)
    longest, image = _longest(arguments), _image(config, arguments)
    if (lengths == longest).all():
        return None
    place = torch.arange(longest + image.seq_len, device=lengths.device)
    return image_first(place < lengths[:, None] + image.seq_len, lengths, image)


def _longest(arguments: Arguments) -> int:
    return int(arguments["encoder_attention_mask"].sum(1).max())


def _image(config: Any, arguments: Arguments) -> TokenLayout:
    height, width = arguments["hidden_states"].shape[-2:]
    return TokenLayout.video(1, height // config.patch_size, width // config.patch_size)


def _heads(config: Any) -> tuple[int, int]:
    return config.num_attention_heads, config.hidden_size // config.num_attention_heads


FAMILIES = {
    "Lumina2Transformer2DModel": Family(
        r"layers\.\d+\.attn",
        _lumina2,
        max_timestep=0.0,
        clean_timestep=1.0,
        heads=_heads,
        arrange=_padded,
    ),
}
