"""HunyuanVideo and its relatives: video tokens, then text tokens whose padding comes last.

FramePack's history comes before the video. It is no part of the video's grid (two of its three
stretches are coarser), so it counts as text does: all see it, and it sees all.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...layout import Segment, TokenLayout
from ..arrangement import Arrangement, version_of
from .family import Arguments, Family
from .way import Axis, Way

# kernels of the host's `HunyuanVideoHistoryPatchEmbed`, which pads latents to their multiple
HISTORY = {
    "latents_clean": (1, 2, 2),
    "latents_history_2x": (2, 4, 4),
    "latents_history_4x": (4, 8, 8),
}


def _video(config: Any, arguments: Arguments) -> Segment:
    _, _, frames, height, width = arguments["hidden_states"].shape
    return Segment.grid(
        frames // config.patch_size_t, height // config.patch_size, width // config.patch_size
    )


def _hunyuan_video(config: Any, arguments: Arguments) -> TokenLayout:
    text = Segment.global_(arguments["encoder_hidden_states"].shape[1])
    return TokenLayout((_video(config, arguments), text))


def _framepack(config: Any, arguments: Arguments) -> TokenLayout:
    mask = arguments["encoder_attention_mask"]
    text = arguments["image_embeds"].shape[1]
    text += mask.shape[1] if len(mask) > 1 else _num_valid(mask, version_of(mask))
    parts = [_video(config, arguments), Segment.global_(text)]
    history = sum(_history(arguments.get(name), kernel) for name, kernel in HISTORY.items())
    return TokenLayout((Segment.global_(history), *parts) if history else tuple(parts))


def _history(latents: Tensor | None, kernel: tuple[int, int, int]) -> int:
    if latents is None:
        return 0
    frames, height, width = (-(-n // k) for n, k in zip(latents.shape[2:], kernel, strict=True))
    return frames * height * width


@functools.lru_cache(maxsize=4)
def _num_valid(mask: Tensor, _version: int) -> int:
    """Cached by the tensor's identity and version: a pipeline passes one tensor to all steps."""
    return int(mask.sum())


def _hunyuan_video15(config: Any, arguments: Arguments) -> TokenLayout:
    names = ("image_embeds", "encoder_hidden_states_2", "encoder_hidden_states")
    text = Segment.global_(sum(arguments[name].shape[1] for name in names))
    return TokenLayout((_video(config, arguments), text))


def _padded(config: Any, arguments: Arguments) -> Arrangement:
    """Each layer makes the outer product of one validity: it is never read back from there."""
    image, first, second = (
        arguments[name]
        for name in ("image_embeds", "encoder_attention_mask", "encoder_attention_mask_2")
    )
    layout = _hunyuan_video15(config, arguments)
    versions = (version_of(image), version_of(first), version_of(second))
    return _valid_first(image, first, second, versions, layout)


@functools.lru_cache(maxsize=4)
def _valid_first(
    image: Tensor, first: Tensor, second: Tensor, _versions: tuple[int, ...], layout: TokenLayout
) -> Arrangement:
    """Cached as `_num_valid` is. The host puts all valid text before all padding itself.

    Image embeddings that are 0 throughout the batch are padding too: text to video.
    """
    valid = first.bool().sum(1) + second.bool().sum(1)
    valid = valid + image.ne(0).any() * image.shape[1]
    return Arrangement(layout, kv_len=valid + layout.num_grid)


LAYERS = r"(single_)?transformer_blocks\.\d+\.attn"


def _replaces_tokens(config: Any) -> bool:
    """Whether the first frame's tokens, which are given, are modulated by themselves (image to video)."""
    return config.image_condition_type == "token_replace"


WAY = Way(
    {
        "rope": {0: Axis(0, 2), 1: Axis(0, 2)},
        "transformer_blocks.0": {"hidden_states": Axis(1, 3)},
    },
    back={"proj_out": Axis(1, 3)},
)

FAMILIES = {
    "HunyuanVideoTransformer3DModel": Family(
        LAYERS, _hunyuan_video, two_calls=True, way=replace(WAY, by_frames=_replaces_tokens)
    ),
    "HunyuanVideoFramepackTransformer3DModel": Family(LAYERS, _framepack, two_calls=True),
    "HunyuanVideo15Transformer3DModel": Family(
        r"transformer_blocks\.\d+\.attn", _hunyuan_video15, arrange=_padded, way=WAY
    ),
}
