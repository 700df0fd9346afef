"""JoyImage Edit: the image's tokens, then those of images that are edited, then text."""

from __future__ import annotations

from typing import Any

from ...layout import Segment, TokenLayout
from .family import Arguments, Family


def _joyimage(config: Any, arguments: Arguments) -> TokenLayout:
    shape = arguments[
        "hidden_states"
    ].shape  # [B, C, F, H, W], or several items in the second place
    frames, rows, columns = (n // p for n, p in zip(shape[-3:], config.patch_size, strict=True))
    others = (shape[1] - 1 if len(shape) == 6 else 0) * frames * rows * columns
    text = Segment.global_(others + arguments["encoder_hidden_states"].shape[1])
    return TokenLayout((Segment.grid(frames, rows, columns), text))


def _heads(config: Any) -> tuple[int, int]:
    return config.num_attention_heads, config.hidden_size // config.num_attention_heads


FAMILIES = {
    "JoyImageEditTransformer3DModel": Family(
        r"double_blocks\.\d+\.attn", _joyimage, heads=_heads, tested="transformer"
    ),
}
