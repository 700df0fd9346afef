"""The model's architecture, and the folder it is written to, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from demos.tiny_vlm.inputs import MERGE, PATCH
from demos.tiny_vlm.questions import build_tokenizer, words
from sparse_dit.whole_file import whole_folder

TEXT = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 192,
    "max_position_embeddings": 16384,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [8, 4, 4],
    },
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
VISION = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "out_hidden_size": 128,
    "window_size": 16,
    "fullatt_block_indexes": [1, 2],
}


def new_model(seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """The untrained model, in float32."""
    torch.manual_seed(seed)
    special = {
        f"{name}_token_id": words().index(f"<|{word}|>")
        for name, word in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    config = Qwen2_5_VLConfig(text_config=dict(TEXT), vision_config=dict(VISION), **special)
    return Qwen2_5_VLForConditionalGeneration(config)


def write_model(model: PreTrainedModel, folder: Path) -> None:
    """Replace `folder` by a copy of the model in bfloat16 and its tokenizer; the old or the new stays.

    Files beside the model's own, such as the model card, stay.
    """
    with whole_folder(folder) as partial:
        copy = type(model)(model.config).to(torch.bfloat16)
        copy.load_state_dict(model.state_dict())
        copy.save_pretrained(partial)
        build_tokenizer().save_pretrained(partial)
        named = partial / "tokenizer_config.json"  # so that transformers 4 knows the class too
        named.write_text(named.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
