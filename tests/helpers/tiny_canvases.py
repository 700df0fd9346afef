"""Tiny random diffusion language models: pipelines that write block after block, and DiffusionGemma."""

from __future__ import annotations

from typing import Any
from unittest import mock

import diffusers
import torch
import transformers as T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from tests.helpers.tiny_language_models import TEXT

MASK = 127
CANVAS = 16


def masked_model(kind: Any = T.LlamaForCausalLM, config: Any = T.LlamaConfig) -> Any:
    """A causal class whose config lets it see both ways."""
    torch.manual_seed(0)
    return kind(config(**TEXT, is_causal=False)).eval()


def llada2(model: Any = None) -> Any:
    """A pipeline of diffusers around a model."""
    model = masked_model() if model is None else model
    pipe = diffusers.LLaDA2Pipeline(model, diffusers.BlockRefinementScheduler(), None)
    pipe.mask_token_id = MASK
    pipe.set_progress_bar_config(disable=True)
    return pipe


def bytes_tokenizer() -> Any:
    """A tokenizer whose tokens are bytes."""
    special = ["<pad>", "<end>", "<mask>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = dict(zip(("pad_token", "eos_token", "mask_token"), special, strict=True))
    return T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def bytes_writer() -> Any:
    """A pipeline with a tokenizer whose tokens are bytes."""
    tokenizer = bytes_tokenizer()
    torch.manual_seed(0)
    config = T.LlamaConfig(**(TEXT | {"vocab_size": len(tokenizer)}), is_causal=False)
    pipe = llada2(T.LlamaForCausalLM(config).eval())
    pipe.tokenizer = tokenizer
    pipe.mask_token_id = pipe.tokenizer.mask_token_id
    return pipe


def prompt(tokens: int, seed: int = 0) -> Tensor:
    """Random ids `[1, N]`."""
    return torch.randint(5, 100, (1, tokens), generator=torch.Generator().manual_seed(seed))


def written(pipe: Any, ids: Tensor, *, length: int = 32, block: int = 16, **more: Any) -> Tensor:
    """What a pipeline writes after a prompt, `[B, length]`: as many tokens in each of four steps a block."""
    options = {"num_inference_steps": 4, "threshold": 2.0, "editing_threshold": None} | more
    found = pipe(
        input_ids=ids, gen_length=length, block_length=block, temperature=0.0, output_type="seq",
        eos_early_stop=False, **options,
    )  # fmt: skip
    return found.sequences


def canvas_writer(scheduler: Any = None, model: Any = None) -> Any:
    """DiffusionGemma's pipeline, whose tokens are bytes. Its template is a prompt and a colon."""
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}:"
    model = diffusion_gemma(vocab_size=len(tokenizer)) if model is None else model
    scheduler = scheduler or diffusers.BlockRefinementScheduler()
    pipe = diffusers.DiffusionGemmaPipeline(model, scheduler, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusion_gemma(steps: int = 3, **more: Any) -> Any:
    """An encoder that fills a cache, and a decoder that denoises 16 tokens beside it."""
    torch.manual_seed(0)
    text = {
        **TEXT, "head_dim": 16, "global_head_dim": 32, "sliding_window": 16, "num_experts": 2,
        "top_k_experts": 1, "moe_intermediate_size": 32, "eos_token_id": 1,
        "layer_types": ["sliding_attention", "full_attention"], **more,
    }  # fmt: skip
    tokens = {"image_token_id": 110, "boi_token_id": 111, "eoi_token_id": 112}
    config = T.DiffusionGemmaConfig(
        text_config=text, vision_config=None, canvas_length=CANVAS, **tokens
    )
    model = T.DiffusionGemmaForBlockDiffusion(config).eval()
    model.generation_config.max_denoising_steps = steps
    return model


def denoised(model: Any, ids: Tensor, canvases: int = 2) -> Tensor:
    """The ids and what a model beside a cache writes after them."""
    torch.manual_seed(1)
    with mock.patch("torch.compiler.cudagraph_mark_step_begin"):  # it imports inductor
        return model.generate(ids, max_new_tokens=canvases * CANVAS).sequences
