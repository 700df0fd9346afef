"""Z-Image: image tokens, then text, both padded to a multiple of 32 by tokens that all can see."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...layout import TokenLayout
from .family import Arguments, Family

MULTIPLE = 32  # SEQ_MULTI_OF of the host


def _zimage(config: Any, arguments: Arguments) -> TokenLayout | None:
    images, captions = arguments["x"], arguments["cap_feats"]
    if not isinstance(images[0], Tensor):  # lists of images: text comes first, clean images follow
        return None
    _, frames, height, width = images[0].shape
    if any(image.shape != images[0].shape for image in images):
        return None
    patch, frame_patch = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    grid = (frames // frame_patch, height // patch, width // patch)
    tokens = grid[0] * grid[1] * grid[2]
    text = max(_padded(len(caption)) for caption in captions)
    return TokenLayout.video(*grid, text_after=_padded(tokens) - tokens + text)


def _padded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


def _heads(config: Any) -> tuple[int, int]:
    return config.n_heads, config.dim // config.n_heads


FAMILIES = {
    "ZImageTransformer2DModel": Family(
        r"layers\.\d+\.attention",
        _zimage,
        max_timestep=0.0,
        clean_timestep=1.0,
        timestep="t",
        heads=_heads,
    ),
}
