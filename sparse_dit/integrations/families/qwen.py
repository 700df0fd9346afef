"""Qwen-Image: text tokens, then image tokens, then those of the images that are edited.

In Qwen-Image 2.1 text and edited images come first, and don't see the image: their keys are cached after the
first step, or attended to block by block.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...layout import Segment, TokenLayout
from ..arrangement import Arrangement, image_first, padding_last, version_of
from .family import Arguments, Family
from .way import Axis, Way


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


def _qwen21(config: Any, arguments: Arguments) -> TokenLayout:
    return _prefixed(config, arguments).layout


def _prefixed(config: Any, arguments: Arguments) -> Arrangement:
    """The image's queries lack the tokens before it, in all steps."""
    slots, mask = arguments["img_mask"], arguments.get("encoder_hidden_states_mask")
    versions = (version_of(slots), None if mask is None else version_of(mask))
    image = TokenLayout.video(*(int(n) for n in arguments["img_shapes"][0][-1]))
    return _prefix_keys(slots, mask, versions, image)


@functools.lru_cache(maxsize=4)
def _prefix_keys(
    slots: Tensor, mask: Tensor | None, _versions: tuple[int | None, ...], image: TokenLayout
) -> Arrangement:
    """Cached by identity and version of the tensors: a pipeline passes the same to all steps.

    Args:
        slots: bool `[B, V]`, the same for all items: places of images, each of which is `SLOT` tokens.
        mask: `[B, text]`, where a token of text is valid, edited images' places included.
        image: Layout of the image alone.
    """
    pictures = slots[0].repeat_interleave(torch.where(slots[0], SLOT, 1))
    start = len(pictures) - image.seq_len
    prefix = (start, 0)
    if mask is not None:
        valid = slots.new_ones(len(mask), len(pictures))
        valid[:, ~pictures] = mask.bool()[:, ~slots[0][: mask.shape[1]]]
        if not bool(valid.all()):
            return replace(image_first(valid, start, image), only_keys=prefix)
    parts = (Segment.global_(start), *image.segments) if start else image.segments
    return Arrangement(TokenLayout(parts), only_keys=prefix)


SLOT = 4

FAMILIES = {
    "QwenImage21Transformer2DModel": Family(
        r"transformer_blocks\.\d+\.attn",
        _qwen21,
        max_timestep=1.0,
        arrange=_prefixed,
        tested="transformer",
    ),
    "QwenImageTransformer2DModel": Family(
        r"transformer_blocks\.\d+\.attn",
        _qwen,
        max_timestep=1.0,
        arrange=_padded,
        two_calls=True,
        way=Way(
            {"": {"controlnet_block_samples": Axis(1, 3)}},
            without=[("pos_embed", 1)],  # the text's
        ),
    ),
}
