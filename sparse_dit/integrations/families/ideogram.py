"""Ideogram 4: padding, text, then image tokens; those of an image alone where there is no prompt."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ...layout import TokenLayout
from ..arrangement import Arrangement, image_first, version_of
from .family import Arguments, Family
from .flux import raster

IMAGE = 2  # the host's OUTPUT_IMAGE_INDICATOR


def _ideogram4(config: Any, arguments: Arguments) -> TokenLayout | None:
    found = _packed(config, arguments)
    return found if found is None else found.layout


def _packed(config: Any, arguments: Arguments) -> Arrangement | None:
    """Layers have a mask of tokens by tokens; what it says is in the forward's segments."""
    tensors = tuple(arguments[name] for name in ("position_ids", "segment_ids", "indicator"))
    return _arranged(*tensors, tuple(version_of(tensor) for tensor in tensors))


@functools.lru_cache(maxsize=4)
def _arranged(
    positions: Tensor, segments: Tensor, indicator: Tensor, _versions: tuple[int, ...]
) -> Arrangement | None:
    """The image first, then its text, then padding; None if not every item is one image at one place.

    Cached by identity and version: a pipeline passes the same tensors to all steps.

    Args:
        positions: `[B, N, 3]`, of which the last two axes are row and column of the image's tokens.
        segments: `[B, N]`: tokens of the same number see each other.
        indicator: `[B, N]`: what each token is.
    """
    image = indicator == IMAGE
    start = int(image[0].int().argmax())
    if not bool(image[:, start:].all()) or bool(image[:, :start].any()):
        return None
    rows, columns = raster(positions, version_of(positions), start)
    if rows * columns != image.shape[1] - start or bool(
        (positions != positions[:1])[:, start:].any()
    ):
        return None
    valid = segments == segments[:, -1:]
    if not bool(valid[:, start:].all()):
        return None
    if bool(valid.all()):
        return Arrangement(TokenLayout.video(1, rows, columns, text_before=start))
    return image_first(valid, start, TokenLayout.video(1, rows, columns))


FAMILIES = {
    "Ideogram4Transformer2DModel": Family(
        r"layers\.\d+\.attention",
        _ideogram4,
        max_timestep=0.0,
        clean_timestep=1.0,
        arrange=_packed,
        tested="transformer",
    ),
}
