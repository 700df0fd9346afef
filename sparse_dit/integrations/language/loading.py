"""Language models and VLMs from a folder or the hub."""

from __future__ import annotations

from typing import Any

import torch
import transformers


def load(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A causal language model, or a VLM, and its tokenizer.

    Args:
        name: A folder or hub id.
        dtype: Of its weights.

    Raises:
        ValueError: If it can't be read.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        auto: Any = transformers.AutoModelForCausalLM
        if type(config) in transformers.AutoModelForImageTextToText._model_mapping:
            auto = transformers.AutoModelForImageTextToText
        model = auto.from_pretrained(name, dtype=dtype, attn_implementation="sdpa")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, KeyError) as error:
        raise ValueError(f"{name} can't be read: {error}") from None
    return model.eval(), tokenizer
