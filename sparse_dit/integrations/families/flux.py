"""Flux, Flux2, Flux3, Chroma, Bria, LongCat-Image, Ovis-Image: text, then image tokens, then those of
reference images.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...layout import Segment, TokenLayout
from ..arrangement import Arrangement, padding_last, version_of
from .family import Arguments, Family, warn_of_other_keys
from .way import Axis, Way


def _flux(config: Any, arguments: Arguments) -> TokenLayout | None:
    ids = arguments["img_ids"]
    rows, columns = raster(ids, version_of(ids))
    if not rows:
        return None
    others = ids.shape[-2] - rows * columns
    parts = [Segment.global_(arguments["encoder_hidden_states"].shape[1])]
    parts.append(Segment.grid(1, rows, columns))
    return TokenLayout((*parts, Segment.global_(others)) if others else tuple(parts))


def _flux2(config: Any, arguments: Arguments) -> TokenLayout | None:
    if arguments.get("kv_cache_mode") is not None:
        warn_of_other_keys("Flux2 with kv_cache_mode")
        return None
    return _flux(config, arguments)


def _flux3(config: Any, arguments: Arguments) -> TokenLayout | None:
    others = arguments.get("image_cond_hidden_states")
    plain = _flux(config, arguments)
    if others is None or plain is None:
        return plain
    return TokenLayout((*plain.segments, Segment.global_(others.shape[1])))


@functools.lru_cache(maxsize=2)
def raster(ids: Tensor, _version: int, start: int = 0) -> tuple[int, int]:
    """Rows and columns of the image that comes first in position ids; zeros if none does.

    Cached by the tensor's identity and version: a pipeline passes one tensor to all steps, and it
    is read back from the device once.

    Args:
        ids: `[N, A]` or `[B, N, A]` with image number, row and column in the first three axes.
            Tokens of higher image numbers may follow: reference images.
        start: Place of the first image token.
    """
    table = ids.detach().reshape(-1, *ids.shape[-2:])[0, start:].cpu().double()
    first = table[:, 0] == table[:, 0].min()
    places = table[first, 1:3]
    places -= places[0].clone()
    rows, columns = (int(n) + 1 for n in places.amax(0))
    axes = (torch.arange(n, device="cpu") for n in (rows, columns))
    whole = torch.cartesian_prod(*axes).double()
    leads = bool(first[: len(places)].all())
    return (rows, columns) if leads and torch.equal(places, whole) else (0, 0)


def _chroma(config: Any, arguments: Arguments) -> Arrangement | None:
    """Layers add the outer product of the float mask `[B, N]` to the logits; they mask nothing."""
    mask, layout = arguments.get("attention_mask"), _flux(config, arguments)
    if mask is None or layout is None or not mask.is_floating_point():
        return None
    return Arrangement(layout, bias=None if _all_ones(mask, version_of(mask)) else mask)


@functools.lru_cache(maxsize=4)
def _all_ones(mask: Tensor, _version: int) -> bool:
    """Whether the same is added to all logits, which changes nothing; read back once a mask."""
    return bool((mask == 1).all())


def _fibo(config: Any, arguments: Arguments) -> Arrangement | None:
    mask = (arguments.get("joint_attention_kwargs") or {}).get("attention_mask")
    layout = _flux(config, arguments)
    if mask is None or layout is None:
        return None
    return padding_last(mask, version_of(mask), layout)


LAYERS = r"(single_)?transformer_blocks\.\d+\.attn"

CONTROLS = ("controlnet_block_samples", "controlnet_single_block_samples")

FAMILIES = {
    "FluxTransformer2DModel": Family(
        LAYERS,
        _flux,
        max_timestep=1.0,
        two_calls=True,
        way=Way({"": dict.fromkeys(CONTROLS, Axis(1, 3))}),
    ),
    "Flux2Transformer2DModel": Family(LAYERS, _flux2, max_timestep=1.0, two_calls=True, way=Way()),
    "Flux3Transformer2DModel": Family(
        r"(mode_blocks\.image|single_transformer_blocks)\.\d+\.attn",
        _flux3,
        max_timestep=1.0,
        image_only=r"mode_blocks\..+",
        tested="transformer",
    ),
    "ChromaTransformer2DModel": Family(
        LAYERS, _flux, max_timestep=1.0, arrange=_chroma, two_calls=True
    ),
    "LongCatImageTransformer2DModel": Family(LAYERS, _flux, max_timestep=1.0, tested="transformer"),
    "OvisImageTransformer2DModel": Family(LAYERS, _flux, max_timestep=1.0, tested="transformer"),
    "BriaTransformer2DModel": Family(LAYERS, _flux, tested="transformer"),
    "BriaFiboTransformer2DModel": Family(LAYERS, _flux, arrange=_fibo, tested="transformer"),
}
