"""Cosmos: video tokens alone, text by cross-attention.

Noise levels are sigma / (sigma + 1): Cosmos 2 and 2.5 pass that as timestep, Cosmos 1 a quarter of sigma's
logarithm (`precondition_noise` of its scheduler). It alone has learnable positions.

Cosmos 3 packs a prompt, which a causal path makes, with images, videos, sound and actions, which see it. The
largest video is the grid; the prompt's tokens are keys that are no queries of it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from torch import Tensor

from ...layout import TokenLayout
from ..arrangement import Arrangement, version_of
from .family import Arguments, Family


def _cosmos(config: Any, arguments: Arguments) -> TokenLayout:
    grid = arguments["hidden_states"].shape[2:]  # [B, C, F, H, W]
    return TokenLayout.video(*(n // p for n, p in zip(grid, config.patch_size, strict=True)))


def _noise(config: Any, timestep: float) -> float:
    if config.extra_pos_embed_type is None:
        return timestep
    return 1 / (1 + math.exp(-4 * timestep))


def _cosmos3(config: Any, arguments: Arguments) -> TokenLayout | None:
    indices = arguments["vision_sequence_indexes"]
    shapes = tuple(tuple(int(n) for n in shape) for shape in arguments["vision_token_shapes"])
    return _joint(indices, version_of(indices), shapes, int(arguments["sequence_length"]))


@functools.lru_cache(maxsize=4)
def _joint(
    indices: Tensor, _version: int, shapes: tuple[tuple[int, ...], ...], length: int
) -> TokenLayout | None:
    """Cached by identity and version of the places `[V]` of the tokens of images and videos."""
    sizes = [math.prod(shape) for shape in shapes]
    if not sizes:
        return None
    number = max(range(len(sizes)), key=lambda n: (sizes[n], n))
    first = sum(sizes[:number])
    places = indices[first : first + sizes[number]].cpu()
    if len(places) != sizes[number] or bool(places.diff().ne(1).any()):
        return None
    before = int(places[0])
    after = length - before - sizes[number]
    return TokenLayout.video(*shapes[number], text_before=before, text_after=after)


def _prompt_keys(config: Any, arguments: Arguments) -> Arrangement | None:
    layout = _cosmos3(config, arguments)
    if layout is None:
        return None
    return Arrangement(layout, only_keys=(int(arguments["und_len"]), 0))


def _heads(config: Any) -> tuple[int, int]:
    return config.num_attention_heads, config.head_dim


FAMILIES = {
    "Cosmos3OmniTransformer": Family(
        r"layers\.\d+\.self_attn",
        _cosmos3,
        timestep="vision_timesteps",
        heads=_heads,
        arrange=_prompt_keys,
        tested="transformer",
    ),
    "CosmosTransformer3DModel": Family(
        r"transformer_blocks\.\d+\.attn1",
        _cosmos,
        noise=_noise,
        two_calls=True,
    ),
}
