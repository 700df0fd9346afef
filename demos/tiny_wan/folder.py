"""Assemble a WanPipeline from its parts and write it as a folder, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from demos.tiny_wan.text import build_encoder, build_tokenizer
from demos.tiny_wan.vae import build_vae, fit_pca
from sparse_dit.whole_file import whole_folder

ARCHITECTURE = {
    "patch_size": (2, 1, 1),
    "num_layers": 6,
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "ffn_dim": 576,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 128,
    "freq_dim": 128,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 256,
}
SHIFT = 4.0


@torch.no_grad()
def new_pipeline(seed: int) -> WanPipeline:
    """A pipeline whose VAE and text encoder are finished and whose transformer is untrained."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(**ARCHITECTURE)
    transformer.proj_out.weight.zero_()
    transformer.proj_out.bias.zero_()
    for block in transformer.blocks:
        block.scale_shift_table[:, [2, 5]] += 0.3  # gates: every branch starts partly open
    return WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=build_encoder(),
        vae=build_vae(fit_pca()),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )


def write_pipeline(pipe: WanPipeline, folder: Path) -> None:
    """Replace `folder` by the pipeline in bfloat16; an interruption leaves the old or the new.

    Files beside the pipeline's own, such as the model card, stay.
    """
    pipe.tokenizer.backend_tokenizer.no_padding()  # else the last call's lengths are saved too
    pipe.tokenizer.backend_tokenizer.no_truncation()
    with whole_folder(folder) as partial:
        pipe.to(torch.bfloat16).save_pretrained(partial)
        for path in partial.rglob("*.json"):
            clean(path)


def clean(path: Path) -> None:
    """Drop where a part was loaded from; name the tokenizer so that transformers 4 knows it too."""
    text = path.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
    content = json.loads(text)
    if content.pop("_name_or_path", None) is not None:
        text = json.dumps(content, indent=2) + "\n"
    path.write_text(text)
