"""A word-level tokenizer for the drawn prompts and a frozen, random UMT5 encoder.

A random encoder is enough: it gives every word in every place its own direction, and the
transformer learns to read them.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from sparse_dit.eval.draw import all_prompts

_SPECIAL = ("<pad>", "</s>", "<unk>")


def words() -> list[str]:
    """All words of all prompts, sorted."""
    return sorted({word for prompt in all_prompts() for word in prompt.split()})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, lower case, punctuation dropped, `</s>` at the end."""
    vocabulary = {word: i for i, word in enumerate((*_SPECIAL, *words()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("removed")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        padding_side="right",
    )


def build_encoder(dim: int = 128, num_layers: int = 2, seed: int = 1234) -> UMT5EncoderModel:
    """A UMT5 encoder whose random weights keep the variance and mix positions."""
    config = UMT5Config(
        vocab_size=64,
        d_model=dim,
        d_kv=32,
        d_ff=2 * dim,
        num_layers=num_layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
    )
    encoder = UMT5EncoderModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in encoder.named_parameters():
        if "layer_norm" in name:
            weight.fill_(1)
        elif "relative_attention_bias" in name:
            weight.normal_(0, 1.5, generator=generator)
        elif "embed_tokens" in name or "shared" in name:
            weight.normal_(0, 1, generator=generator)
        else:
            weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
    return encoder


@torch.no_grad()
def encode(
    tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, prompts: list[str], length: int
) -> tuple[Tensor, Tensor]:
    """What WanPipeline gives its transformer, and which of it is text.

    Returns:
        States of shape `[B, length, dim]`, zero behind the text, and the mask `[B, length]` of the
        text.
    """
    tokens = tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    mask = tokens.attention_mask.bool()
    return states * mask.unsqueeze(-1), mask
