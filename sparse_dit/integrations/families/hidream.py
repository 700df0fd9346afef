"""HiDream: image tokens (padded if the image isn't square), then text of T5 and of two Llama layers."""

from __future__ import annotations

from typing import Any

from ...layout import TokenLayout
from .family import Arguments, Family


def _hidream(config: Any, arguments: Arguments) -> TokenLayout | None:
    latents = arguments["hidden_states"]
    if latents.ndim != 4:  # tokens that came packed, with their own ids and mask
        return None
    height, width = latents.shape[-2:]
    rows, columns = height // config.patch_size, width // config.patch_size
    text = arguments["encoder_hidden_states_t5"].shape[1]
    text += 2 * arguments["encoder_hidden_states_llama3"][0].shape[1]
    if height != width:  # the host appends tokens with keys of zero, and masks none of them
        text += config.max_resolution[0] * config.max_resolution[1] // config.patch_size**2
        text -= rows * columns
    return TokenLayout.video(1, rows, columns, text_after=text)


FAMILIES = {
    "HiDreamImageTransformer2DModel": Family(
        r"(double|single)_stream_blocks\.\d+\.block\.attn1", _hidream, timestep="timesteps"
    ),
}
