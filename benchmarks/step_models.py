"""Transformers of real size with random weights, and a forward of each: what `wan_step.py` times."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.modular_pipelines.minimax_h3.before_denoise import (
    MiniMaxH3PrepareLayoutStep,
    MiniMaxH3SetTimestepsStep,
)
from torch import Tensor, nn

from sparse_dit.layout import TokenLayout

Counts = dict[str, int]  # blocks of each list of a transformer


@dataclass(frozen=True)
class Case:
    """A model at one size.

    Args:
        model: The class of diffusers.
        config: What differs from its default configuration; of the lists of blocks it says nothing.
        blocks: How many blocks each of its lists has.
        counted: The configuration's name for each of those numbers.
        layout: Where the tokens of one sequence lie.
        inputs: Makes a forward's arguments of the transformer and the layout, on the CPU.
        timestep: What the model is told at a noise level from 1 to 0.
    """

    model: str
    config: Mapping[str, Any]
    blocks: Mapping[str, int]
    counted: Mapping[str, str]
    layout: TokenLayout
    inputs: Callable[[Any, TokenLayout], dict[str, Any]]
    timestep: Callable[[float], float] = lambda noise: 1000 * noise


def made(case: Case, counts: Counts, device: str, dtype: torch.dtype) -> Any:
    """The transformer with so many blocks, on the device; blocks of a list have the same random weights."""
    one = dict.fromkeys(case.counted.values(), 1)
    torch.manual_seed(0)
    with torch.device(device):
        transformer = getattr(diffusers, case.model)(**case.config, **one)
    kept = type(transformer)._keep_in_fp32_modules or ()  # as when weights are loaded
    for name, parameter in transformer.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
    for name, count in counts.items():
        blocks = getattr(transformer, name)
        blocks.extend(copy.deepcopy(blocks[0]) for _ in range(count - 1))
    transformer.register_to_config(**{case.counted[name]: n for name, n in counts.items()})
    return transformer.eval()


@contextlib.contextmanager
def shortened(transformer: Any, name: str, count: int) -> Iterator[None]:
    """Inside the block a list of blocks has its first ones alone."""
    every = getattr(transformer, name)
    setattr(transformer, name, nn.ModuleList(every[:count]))
    try:
        yield
    finally:
        setattr(transformer, name, every)


def call_of(case: Case, transformer: Any, device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A forward at the case's size, batch 1, which waits for its end; a noise level may be given."""
    arguments = {
        name: x.to(device, dtype if x.is_floating_point() and name != "timestep" else x.dtype)
        for name, x in case.inputs(transformer, case.layout).items()
    }

    def call(noise: float | None = None) -> Tensor:
        given = arguments
        if noise is not None:
            level = torch.full_like(arguments["timestep"], case.timestep(noise))
            given = arguments | {"timestep": level}
        out = transformer(**given, return_dict=False)[0]
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    return call


def _latents(transformer: Any, layout: TokenLayout) -> Tensor:
    frames, rows, columns = layout.grid
    size = (1, transformer.config.in_channels, frames, 2 * rows, 2 * columns)
    return _random(*size)


def _random(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def _wan(transformer: Any, layout: TokenLayout) -> dict[str, Any]:
    return {
        "hidden_states": _latents(transformer, layout),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": _random(1, 512, transformer.config.text_dim),
    }


def _hunyuan(transformer: Any, layout: TokenLayout) -> dict[str, Any]:
    text = layout.seq_len - layout.num_grid
    return {
        "hidden_states": _latents(transformer, layout),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": _random(1, text, transformer.config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, text, dtype=torch.bool),
        "pooled_projections": _random(1, transformer.config.pooled_projection_dim),
        "guidance": torch.tensor([6000.0]),
    }


def _minimax(transformer: Any, layout: TokenLayout) -> dict[str, Any]:
    """Text, sound and video in one sequence, as the host's own steps make it."""
    frames, rows, columns = layout.grid
    before = layout.seq_len - layout.num_grid
    sound = 5 * frames // 3
    packed = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        torch.ones(before - 2 * sound), frames, 2 * rows, 2 * columns, sound, (1, 2, 2), 2, 2, 0
    )
    positions, tags, video, audio, text, *given = packed
    timestep, levels = MiniMaxH3SetTimestepsStep.build_row_timesteps(
        video, audio, *given, len(text), 0.3, 0.6, 0.999, 1.0
    )
    config = transformer.config
    return {
        "hidden_states": _random(1, len(video), 4 * config.in_channels),
        "audio_hidden_states": _random(1, len(audio), config.audio_in_channels),
        "encoder_hidden_states": _random(1, len(text), config.text_dim),
        "timestep": timestep, "timestep_indices": levels, "token_tags": tags,
        "position_ids": positions, "video_indices": video, "audio_indices": audio, "text_indices": text,
    }  # fmt: skip


def _clean(noise: float) -> float:
    return 1 - noise


def _wan_case(heads: int, layers: int, width: int, grid: tuple[int, int, int]) -> Case:
    config = {"num_attention_heads": heads, "ffn_dim": width, "text_dim": 4096}
    return Case(
        "WanTransformer3DModel", config, {"blocks": layers}, {"blocks": "num_layers"},
        TokenLayout.video(*grid), _wan,
    )  # fmt: skip


HUNYUAN = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}
P480, P720 = (21, 30, 52), (21, 45, 80)  # 81 frames
CASES = {
    "wan-1.3b-480p": _wan_case(12, 30, 8960, P480),
    "wan-1.3b-720p": _wan_case(12, 30, 8960, P720),
    "wan-14b-480p": _wan_case(40, 40, 13824, P480),
    "wan-14b-720p": _wan_case(40, 40, 13824, P720),
    "hunyuanvideo-720p": Case(
        "HunyuanVideoTransformer3DModel", {},
        {"transformer_blocks": 20, "single_transformer_blocks": 40}, HUNYUAN,
        TokenLayout.video(33, 45, 80, text_after=256), _hunyuan,
    ),
    "minimax-h3-768p": Case(
        "MiniMaxH3Transformer3DModel", {}, {"transformer_blocks": 50},
        {"transformer_blocks": "num_layers"},
        TokenLayout.video(37, 24, 42, text_before=670), _minimax, _clean,
    ),
}  # fmt: skip
DRY = {
    "wan": _wan_case(2, 3, 64, (2, 4, 6)),
    "hunyuanvideo": Case(
        "HunyuanVideoTransformer3DModel",
        {"num_attention_heads": 2, "num_refiner_layers": 1, "text_embed_dim": 32,
         "pooled_projection_dim": 16},
        {"transformer_blocks": 2, "single_transformer_blocks": 2}, HUNYUAN,
        TokenLayout.video(2, 4, 6, text_after=5), _hunyuan,
    ),
    "minimax-h3": Case(
        "MiniMaxH3Transformer3DModel",
        {"num_attention_heads": 2, "hidden_size": 32, "num_refiner_layers": 1, "ffn_dim": 32, "text_dim": 32,
         "freq_dim": 16, "time_embed_hidden_dim": 16, "time_embed_dim": 16},
        {"transformer_blocks": 2}, {"transformer_blocks": "num_layers"},
        TokenLayout.video(3, 4, 6, text_before=22), _minimax, _clean,
    ),
}  # fmt: skip
