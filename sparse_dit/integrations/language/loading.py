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


def outline(
    name: str, dtype: torch.dtype, part: str = "", tokenizer_part: str = ""
) -> tuple[Any, Any]:
    """A causal language model without weights, which are on the meta device, and its tokenizer.

    Args:
        name: A folder or hub id.
        dtype: Of the weights that it would have.
        part, tokenizer_part: Folders in it where their files lie.

    Raises:
        ValueError: If it can't be read.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(name, subfolder=part)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa"
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, subfolder=tokenizer_part)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{name} can't be read: {error}") from None
    return model.eval(), tokenizer
