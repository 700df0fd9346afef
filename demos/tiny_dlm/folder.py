"""The model's architecture, and the LLaDA2Pipeline's folder it is written to, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.llada2.pipeline_llada2 import LLaDA2Pipeline
from diffusers.schedulers.scheduling_block_refinement import BlockRefinementScheduler
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from demos.tiny_dlm.tokens import END, PAD, build_tokenizer, number_of
from sparse_dit.whole_file import whole_folder

ARCHITECTURE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 16384,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
    "is_causal": False,
}


def new_model(seed: int) -> Qwen3ForCausalLM:
    """The untrained model, in float32; every token attends to all."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            **ARCHITECTURE,
            vocab_size=len(build_tokenizer()),
            bos_token_id=None,
            eos_token_id=number_of(END),
            pad_token_id=number_of(PAD),
        )
    )
    set_numbers(model.model.embed_tokens.weight, model.config.initializer_range)
    return model


@torch.no_grad()
def set_numbers(embedding: Tensor, std: float) -> None:
    """Let the vector of each token of two or three digits be the sum of one for each digit at its place.

    So what is learned about one number holds for others: to copy them, too few of each are seen.
    """
    for digits in (2, 3):
        known = torch.randn(digits, 10, embedding.shape[1]) * std
        for number in range(10**digits):
            word = f"{number:0{digits}d}"
            token = build_tokenizer().convert_tokens_to_ids(word)
            if token is not None:
                embedding[token] = known[range(digits), [int(digit) for digit in word]].sum(0)


def write_pipeline(model: PreTrainedModel, folder: Path) -> None:
    """Replace `folder` by a pipeline with a copy of the model in bfloat16; the old or the new stays.

    The tokenizer lies beside the pipeline's parts and is not in its index: diffusers 0.42 neither saves
    nor loads this pipeline's tokenizer. Files beside the pipeline's own, such as the model card, stay.
    """
    copy: Any = type(model)(model.config)
    copy.to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    with whole_folder(folder) as partial:
        LLaDA2Pipeline(copy, BlockRefinementScheduler()).save_pretrained(partial)
        build_tokenizer().save_pretrained(partial / "tokenizer")
        for path in partial.rglob("*.json"):
            _clean(path, drop="tokenizer" if path.name == "model_index.json" else "_name_or_path")


def _clean(path: Path, drop: str) -> None:
    """Drop an entry, if it is there; name the tokenizer so that transformers 4 knows it too."""
    text = path.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
    content = json.loads(text)
    if content.pop(drop, None) is not None:
        text = json.dumps(content, indent=2) + "\n"
    path.write_text(text)


def load_pipeline(folder: str | Path) -> Any:
    """The pipeline of a folder in float32, with its tokenizer and without progress bars."""
    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
    pipe = LLaDA2Pipeline.from_pretrained(folder, tokenizer=tokenizer, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.model.eval()
    return pipe
