"""Krea 2: text tokens, then image tokens."""

from __future__ import annotations

from typing import Any

from ...layout import Segment, TokenLayout
from ..arrangement import Arrangement, padding_last, version_of
from .family import Arguments, Family
from .flux import raster


def _krea2(config: Any, arguments: Arguments) -> TokenLayout | None:
    ids, text = arguments["position_ids"], arguments["encoder_hidden_states"].shape[1]
    rows, columns = raster(ids, version_of(ids), text)
    if rows * columns != len(ids) - text:
        return None
    return TokenLayout((Segment.global_(text), Segment.grid(1, rows, columns)))


def _padded(config: Any, arguments: Arguments) -> Arrangement | None:
    mask, layout = arguments.get("encoder_attention_mask"), _krea2(config, arguments)
    return None if mask is None or layout is None else padding_last(mask, version_of(mask), layout)


FAMILIES = {
    "Krea2Transformer2DModel": Family(
        r"transformer_blocks\.\d+\.attn",
        _krea2,
        max_timestep=1.0,
        arrange=_padded,
        tested="transformer",
        two_calls=True,
    ),
}
