"""A tiny random MiniMax-H3, whole: from a prompt to frames."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3Blocks

from tests.helpers.tiny_pipelines import tokenizer

WIDTH = 32  # of the text encoder


class Processor:
    """What a Qwen3-VL processor says of a prompt without pictures."""

    def create_mm_token_type_ids(self, token_ids: list[list[int]]) -> list[list[int]]:
        return [[0] * len(ids) for ids in token_ids]


def minimax_h3(transformer: Any) -> Any:
    """The pipeline that makes videos of prompts, around a transformer for texts of `WIDTH` channels."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 320,
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 51,  # the host takes what the 50th gives
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "deepstack_visual_indexes": [],
    }
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    vae = diffusers.AutoencoderKLMiniMaxH3(
        block_out_channels=(4,) * 6,
        layers_per_block=1,
        norm_num_groups=2,
        decoder_num_layers=1,
        decoder_num_attention_heads=1,
        decoder_attention_head_dim=16,
        decoder_num_register_tokens=1,
        decoder_ffn_mult=1,
    )
    blocks = MiniMaxH3Blocks().get_workflow("t2va")
    parts = {
        "text_encoder": transformers.Qwen3VLForConditionalGeneration(config).eval(),
        "tokenizer": tokenizer(),
        "processor": Processor(),
        "vae": vae.eval(),
        "transformer": transformer,
        "scheduler": diffusers.MiniMaxH3Scheduler(shift=12.0),
        "audio_scheduler": diffusers.MiniMaxH3Scheduler(shift=3.0),
    }
    blocks.sub_blocks.pop("decode.audio")  # the slowest by far
    pipe = blocks.init_pipeline()
    pipe.update_components(**parts)
    return pipe
