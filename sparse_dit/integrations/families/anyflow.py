"""AnyFlow: video tokens alone, frames before channels; text by cross-attention."""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family


def _anyflow(config: Any, arguments: Arguments) -> TokenLayout:
    _, frames, _, height, width = arguments["hidden_states"].shape
    _, rows, columns = config.patch_size
    return TokenLayout.video(frames, height // rows, width // columns)


FAMILIES = {
    "AnyFlowTransformer3DModel": Family(r"blocks\.\d+\.attn1", _anyflow),
}
