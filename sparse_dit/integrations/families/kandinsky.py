"""Kandinsky 5 and 6: video tokens alone, channels last; text (and sound) by cross-attention."""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family


def _kandinsky(config: Any, arguments: Arguments) -> TokenLayout | None:
    if arguments.get("sparse_params") is not None:  # its own sparse attention, in blocks of 8 x 8
        return None
    grid = arguments["hidden_states"].shape[1:4]  # [B, F, H, W, C]
    return TokenLayout.video(*(n // p for n, p in zip(grid, config.patch_size, strict=True)))


def _heads(config: Any) -> tuple[int, int]:
    head_dim = sum(config.axes_dims)
    return config.model_dim // head_dim, head_dim


FAMILIES = {
    "Kandinsky5Transformer3DModel": Family(
        r"visual_transformer_blocks\.\d+\.self_attention",
        _kandinsky,
        heads=_heads,
        two_calls=True,
    ),
    "Kandinsky6Transformer3DModel": Family(
        r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention",
        _kandinsky,
        heads=_heads,
        two_calls=True,
        tested="transformer",
    ),
}
