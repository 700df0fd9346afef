"""Flux, Flux2, Chroma: text tokens, then image tokens, then those of reference images."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...layout import Segment, TokenLayout
from ..arrangement import Arrangement
from .family import Arguments, Family


def _flux(config: Any, arguments: Arguments) -> TokenLayout | None:
    ids = arguments["img_ids"]
    rows, columns = raster(ids, ids._version)
    if not rows:
        return None
    others = ids.shape[-2] - rows * columns
    parts = [Segment.text(arguments["encoder_hidden_states"].shape[1])]
    parts.append(Segment.video(1, rows, columns))
    return TokenLayout((*parts, Segment.text(others)) if others else tuple(parts))


def _flux2(config: Any, arguments: Arguments) -> TokenLayout | None:
    if arguments.get("kv_cache_mode") is not None:  # keys and queries of reference images differ
        return None
    return _flux(config, arguments)


@functools.lru_cache(maxsize=2)
def raster(ids: Tensor, _version: int) -> tuple[int, int]:
    """Rows and columns of the image that comes first in position ids; zeros if none does.

    Cached by the tensor's identity and version: a pipeline passes one tensor to all steps, and it
    is read back from the device once.

    Args:
        ids: `[N, A]` or `[B, N, A]` with image number, row and column in the first three axes.
            Tokens whose image number differs from the first one's may follow: reference images.
    """
    table = ids.detach().reshape(-1, *ids.shape[-2:])[0].cpu().double()
    same = table[:, 0] == table[0, 0]
    image = table[same]
    rows, columns = (int(n) + 1 for n in image.amax(0)[1:3])
    whole = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
    ordered = bool(same[: len(image)].all()) and not table[0, 0]
    return (rows, columns) if ordered and torch.equal(image[:, 1:3], whole) else (0, 0)


def _chroma(config: Any, arguments: Arguments) -> Arrangement | None:
    """Layers add the outer product of the float mask `[B, N]` to the logits; they mask nothing."""
    mask, layout = arguments.get("attention_mask"), _flux(config, arguments)
    if mask is None or layout is None or not mask.is_floating_point():
        return None
    return Arrangement(layout, bias=None if _all_ones(mask, mask._version) else mask)


@functools.lru_cache(maxsize=4)
def _all_ones(mask: Tensor, _version: int) -> bool:
    """Whether the same is added to all logits, which changes nothing; read back once a mask."""
    return bool((mask == 1).all())


LAYERS = r"(single_)?transformer_blocks\.\d+\.attn"

FAMILIES = {
    "FluxTransformer2DModel": Family(LAYERS, _flux, max_timestep=1.0),
    "Flux2Transformer2DModel": Family(LAYERS, _flux2, max_timestep=1.0),
    "ChromaTransformer2DModel": Family(LAYERS, _flux, max_timestep=1.0, arrange=_chroma),
}
