"""Bria Fibo 2: gist tokens that a prompt is made into, then image tokens, then those of edited images."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ...layout import Segment, TokenLayout
from ..arrangement import version_of
from .family import Arguments, Family


def _fibo2(config: Any, arguments: Arguments) -> TokenLayout:
    text, mask = arguments["encoder_hidden_states"], arguments.get("encoder_attention_mask")
    lengths = (text.shape[2],) if mask is None else _lengths(mask, version_of(mask))
    gists = _gists(config, lengths)
    image, *others = (
        Segment.grid(1, *(n // config.patch_size for n in latents.shape[-2:]))
        for latents in (arguments["hidden_states"], *(arguments.get("context_latents") or ()))
    )
    clean = sum(other.length for other in others)
    if min(gists) == max(gists):
        parts = (Segment.global_(gists[0]), image)
        return TokenLayout((*parts, Segment.global_(clean)) if clean else parts)
    return TokenLayout((image, Segment.global_(clean + max(gists))))  # padded: the gist comes last


def _gists(config: Any, lengths: tuple[int, ...]) -> list[int]:
    """How many tokens the host makes prompts of these lengths into."""
    from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count

    return compute_gist_count(
        list(lengths),
        min_gist=config.min_num_gist_tokens,
        max_gist=config.max_num_gist_tokens,
        gist_step=config.gist_step,
        min_text_len=config.gist_min_text_len,
        max_text_len=config.gist_max_text_len,
    )


@functools.lru_cache(maxsize=4)
def _lengths(mask: Tensor, _version: int) -> tuple[int, ...]:
    """Cached by the mask's identity and version: a pipeline passes one tensor to all steps."""
    return tuple(mask.sum(1).tolist())


def _heads(config: Any) -> tuple[int, int]:
    return config.n_heads, config.dim // config.n_heads


FAMILIES = {
    "BriaFibo2Transformer2DModel": Family(
        r"layers\.\d+\.attention",
        _fibo2,
        max_timestep=1.0,
        heads=_heads,
        tested="transformer",
    ),
}
