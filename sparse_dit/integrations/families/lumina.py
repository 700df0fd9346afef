"""Lumina 2: each item's valid text tokens, then its image tokens, then padding. Lumina-Next: no text."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...layout import TokenLayout
from ..arrangement import Arrangement, image_first, version_of
from .family import Arguments, Family


def _lumina2(config: Any, arguments: Arguments) -> TokenLayout:
    mask = arguments["encoder_attention_mask"]
    height, width = _rows_and_columns(config, arguments)
    longest = max(_lengths(mask, version_of(mask)))  # 0 for an empty prompt without special tokens
    return TokenLayout.video(1, height, width, text_before=longest)


def _padded(config: Any, arguments: Arguments) -> Arrangement | None:
    """Images start at different places if texts differ in length: move them to the front."""
    mask = arguments["encoder_attention_mask"]
    return _image_first(mask, version_of(mask), _image(config, arguments))


@functools.lru_cache(maxsize=4)
def _image_first(mask: Tensor, _version: int, image: TokenLayout) -> Arrangement | None:
    """Cached by the mask's identity and version, as `_lengths`: a run has one mask a branch."""
    lengths = torch.tensor(_lengths(mask, _version), device=mask.device)
    longest = max(_lengths(mask, _version))
    if min(_lengths(mask, _version)) == longest:
        return None
    place = torch.arange(longest + image.seq_len, device=mask.device)
    return image_first(place < lengths[:, None] + image.seq_len, lengths, image)


@functools.lru_cache(maxsize=4)
def _lengths(mask: Tensor, _version: int) -> tuple[int, ...]:
    """Valid text tokens of each item."""
    return tuple(int(n) for n in mask.sum(1).tolist())


def _rows_and_columns(config: Any, arguments: Arguments) -> tuple[int, int]:
    height, width = arguments["hidden_states"].shape[-2:]
    return height // config.patch_size, width // config.patch_size


def _next(config: Any, arguments: Arguments) -> Arrangement:
    """Layers expand a mask of ones to one of tokens by tokens, each anew: it is never read."""
    return Arrangement(_image(config, arguments))


def _image(config: Any, arguments: Arguments) -> TokenLayout:
    return TokenLayout.video(1, *_rows_and_columns(config, arguments))


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
        two_calls=True,
    ),
    "LuminaNextDiT2DModel": Family(
        r"layers\.\d+\.attn1",
        _image,
        max_timestep=0.0,
        clean_timestep=1.0,
        heads=_heads,
        arrange=_next,
        tested="transformer",
    ),
}
