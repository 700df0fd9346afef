"""Tiny Qwen-VLs with processors of transformers, made offline: drawn pictures and clips in, tokens out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers as T
from transformers.image_processing_base import BatchFeature
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from tests.helpers.tiny_language_models import tokenizer, vision

MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PATCH, MERGE, DEEP = 4, 2, 2


def patches(frames: np.ndarray) -> tuple[torch.Tensor, list[int]]:
    """Frames `[T, H, W, 3]` as patches, those of a token after one another, and their grid."""
    depth, height, width, _ = frames.shape
    t, h, w = depth // DEEP, height // PATCH, width // PATCH
    x = torch.from_numpy(frames).float().permute(0, 3, 1, 2) / 127.5 - 1
    x = x.reshape(t, DEEP, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(t * h * w, 3 * DEEP * PATCH * PATCH), [t, h, w]


class Clips(BaseVideoProcessor):
    """In place of transformers' own video processors, which need torchvision: clips of whole patches."""

    merge_size, temporal_patch_size = MERGE, DEEP

    def __init__(self) -> None:
        pass

    def __call__(self, videos: Any, **_: Any) -> BatchFeature:
        made = [patches(clip) for clip in videos]
        facts = [
            VideoMetadata(len(clip), fps=2.0, frames_indices=list(range(len(clip))))
            for clip in videos
        ]
        return BatchFeature(
            {
                "pixel_values_videos": torch.cat([pixels for pixels, _ in made]),
                "video_grid_thw": torch.tensor([grid for _, grid in made]),
                "video_metadata": facts,
            }
        )


def with_processor(name: str) -> tuple[Any, Any]:
    """A model `"qwen2_5_vl"` or `"qwen3_vl"` and a processor for it."""
    made, _ = vision(name)
    text = tokenizer()
    text.add_special_tokens({"additional_special_tokens": list(MARKS)})
    text.pad_token, text.padding_side = "?", "left"
    config = made.config
    config.text_config.vocab_size = len(text)
    places = ("vision_start", "vision_end", "image", "video")
    for place, mark in zip(places, MARKS, strict=True):
        setattr(config, f"{place}_token_id", text.convert_tokens_to_ids(mark))
    torch.manual_seed(0)
    model = type(made)(config).eval()
    kind = {"qwen2_5_vl": T.Qwen2_5_VLProcessor, "qwen3_vl": T.Qwen3VLProcessor}[name]
    pictures = T.Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=DEEP,
        min_pixels=64,
        max_pixels=1 << 14,
    )
    # the check of classes knows none of videos without torchvision
    kind = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None})
    return model, kind(image_processor=pictures, tokenizer=text, video_processor=Clips())


def drawn(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """A clip of a bright square that moves over a noisy ground: uint8 `[T, H, W, 3]`."""
    rng = np.random.default_rng(seed)
    clip = rng.integers(0, 60, (frames, height, width, 3), dtype=np.uint8)
    for t in range(frames):
        x = (width - 8) * t // max(1, frames - 1)
        clip[t, height // 4 : height // 4 + 8, x : x + 8] = (250, 40 * (seed % 6), 10)
    return clip
