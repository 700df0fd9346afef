"""JoyImage Edit: the image's tokens, then those of images that are edited, then text."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...layout import Segment, TokenLayout
from ..arrangement import Arrangement, image_first, version_of
from .family import Arguments, Family


def _joyimage(config: Any, arguments: Arguments) -> TokenLayout:
    shape = arguments[
        "hidden_states"
    ].shape  # [B, C, F, H, W], or several items in the second place
    frames, rows, columns = (n // p for n, p in zip(shape[-3:], config.patch_size, strict=True))
    others = (shape[1] - 1 if len(shape) == 6 else 0) * frames * rows * columns
    text = Segment.global_(others + arguments["encoder_hidden_states"].shape[1])
    return TokenLayout((Segment.grid(frames, rows, columns), text))


def _plus(config: Any, arguments: Arguments) -> TokenLayout | None:
    """Items hold several images of sizes of their own, padded to one length; the first is made."""
    first, *others = (item[0] for item in arguments["shape_list"])
    if any(shape != first for shape in others):  # one layout holds for a batch
        return None
    image = Segment.grid(*(int(n) for n in first))
    length = arguments["hidden_states"].shape[1] + arguments["encoder_hidden_states"].shape[1]
    return TokenLayout((image, Segment.global_(length - image.length)))


def _padded(config: Any, arguments: Arguments) -> Arrangement | None:
    """Padding of the images lies before the text."""
    mask, layout = arguments.get("encoder_hidden_states_mask"), _plus(config, arguments)
    if mask is None or layout is None:
        return None
    lengths = tuple(
        sum(frames * height * width for frames, height, width in item)
        for item in arguments["shape_list"]
    )
    return _valid_first(mask, version_of(mask), lengths, layout)


@functools.lru_cache(maxsize=4)
def _valid_first(
    mask: Tensor, _version: int, lengths: tuple[int, ...], layout: TokenLayout
) -> Arrangement:
    """Cached by the mask's identity and version: a pipeline passes one tensor to all steps."""
    images = layout.seq_len - mask.shape[1]
    place = torch.arange(images, device=mask.device)
    valid = place < torch.tensor(lengths, device=mask.device)[:, None]
    return image_first(torch.cat([valid, mask.bool()], 1), 0, layout.without_global())


def _heads(config: Any) -> tuple[int, int]:
    return config.num_attention_heads, config.hidden_size // config.num_attention_heads


FAMILIES = {
    "JoyImageEditTransformer3DModel": Family(
        r"double_blocks\.\d+\.attn", _joyimage, heads=_heads, tested="transformer"
    ),
    "JoyImageEditPlusTransformer3DModel": Family(
        r"double_blocks\.\d+\.attn", _plus, heads=_heads, arrange=_padded, tested="transformer"
    ),
}
