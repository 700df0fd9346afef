"""LTX: packed video tokens alone, text by cross-attention."""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family


def _ltx(config: Any, arguments: Arguments) -> TokenLayout | None:
    grid = [arguments.get(name) for name in ("num_frames", "height", "width")]
    if None in grid:  # positions came as video_coords: extra frames may be appended
        return None
    return TokenLayout.video(*(int(n) for n in grid))  # pyright: ignore[reportArgumentType]


FAMILIES = {
    "LTXVideoTransformer3DModel": Family(r"transformer_blocks\.\d+\.attn1", _ltx),
}
