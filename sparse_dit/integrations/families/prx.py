"""PRX and Nucleus-Image: image tokens whose keys include the text's, which is no query."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...layout import Segment, TokenLayout
from ..arrangement import Arrangement, image_first, padding_last, version_of
from .family import Arguments, Family


def _prx(config: Any, arguments: Arguments) -> TokenLayout:
    height, width = arguments["hidden_states"].shape[-2:]
    text = arguments["encoder_hidden_states"].shape[1]
    rows, columns = height // config.patch_size, width // config.patch_size
    return TokenLayout.video(1, rows, columns, text_before=text)


def _prx_keys(config: Any, arguments: Arguments) -> Arrangement:
    layout, mask = _prx(config, arguments), arguments.get("attention_mask")
    text = (layout.num_global, 0)
    if mask is None:
        return Arrangement(layout, only_keys=text)
    return replace(padding_last(mask, version_of(mask), layout), only_keys=text)


def _nucleus(config: Any, arguments: Arguments) -> TokenLayout | None:
    shapes = arguments["img_shapes"]
    first, *others = [shapes] if isinstance(shapes, tuple) else shapes
    if any(shape != first for shape in others):  # one layout holds for a batch
        return None
    image = Segment.grid(*(int(n) for n in first))
    return TokenLayout((image, Segment.global_(arguments["encoder_hidden_states"].shape[1])))


def _nucleus_keys(config: Any, arguments: Arguments) -> Arrangement | None:
    layout, mask = _nucleus(config, arguments), arguments.get("encoder_hidden_states_mask")
    if layout is None:
        return None
    if mask is None:
        return Arrangement(layout, only_keys=(0, layout.num_global))
    return _text_last(mask, version_of(mask), layout)


@functools.lru_cache(maxsize=4)
def _text_last(mask: Tensor, _version: int, layout: TokenLayout) -> Arrangement:
    """Cached by the mask's identity and version: a pipeline passes one tensor to all steps."""
    valid = mask.bool()
    seen = valid.new_ones(len(mask), layout.seq_len)
    seen[:, layout.num_grid :] = valid
    found = image_first(seen, 0, layout.without_global())
    return replace(found, only_keys=(0, layout.num_global))


def _prx_heads(config: Any) -> tuple[int, int]:
    return config.num_heads, config.hidden_size // config.num_heads


FAMILIES = {
    "PRXTransformer2DModel": Family(
        r"blocks\.\d+\.attention",
        _prx,
        max_timestep=1.0,
        heads=_prx_heads,
        arrange=_prx_keys,
        tested="transformer",
    ),
    "NucleusMoEImageTransformer2DModel": Family(
        r"transformer_blocks\.\d+\.attn",
        _nucleus,
        max_timestep=1.0,
        arrange=_nucleus_keys,
        two_calls=True,
        tested="transformer",
    ),
}
