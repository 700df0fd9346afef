"""LTX and LTX 2: packed video tokens alone, text (and sound) by cross-attention."""

from __future__ import annotations

from typing import Any

from ...layout import Segment, TokenLayout
from .family import Arguments, Family


def _ltx(config: Any, arguments: Arguments) -> TokenLayout | None:
    grid = [arguments.get(name) for name in ("num_frames", "height", "width")]
    if None in grid:  # positions came as video_coords: extra frames may be appended
        return None
    return TokenLayout.video(*(int(n) for n in grid))  # pyright: ignore[reportArgumentType]


def _ltx2(config: Any, arguments: Arguments) -> TokenLayout | None:
    """Keyframes and references may be appended to the grid: all see them, as if they were text."""
    video = _ltx(config, arguments)
    if video is None:
        return None
    others = arguments["hidden_states"].shape[1] - video.seq_len
    if others < 0:
        return None
    return TokenLayout((*video.segments, Segment.text(others))) if others else video


LAYERS = r"transformer_blocks\.\d+\.attn1"

FAMILIES = {
    "LTXVideoTransformer3DModel": Family(LAYERS, _ltx),
    "LTX2VideoTransformer3DModel": Family(LAYERS, _ltx2),
}
