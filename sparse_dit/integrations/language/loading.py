"""Language models and VLMs from a folder or the hub."""

from __future__ import annotations

from typing import Any

import torch
import transformers


def load(
    name: str, dtype: torch.dtype, part: str = "", tokenizer_part: str = ""
) -> tuple[Any, Any]:
    """A causal language model, or a VLM, and its tokenizer.

    Args:
        name: A folder or hub id.
        dtype: The dtype of its weights.
        part, tokenizer_part: Folders in it where their files lie.

    Raises:
        ValueError: If it can't be read.
    """
    try:
        auto = _auto(transformers.AutoConfig.from_pretrained(name, subfolder=part))
        options = {"dtype": dtype, "attn_implementation": "sdpa"}
        model = auto.from_pretrained(name, subfolder=part, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, subfolder=tokenizer_part)
    except (OSError, KeyError) as error:
        raise ValueError(f"{name} can't be read: {error}") from None
    return model.eval(), tokenizer


def outline(
    name: str, dtype: torch.dtype, part: str = "", tokenizer_part: str = ""
) -> tuple[Any, Any]:
    """A language model without weights, which are on the meta device, and its tokenizer.

    Args:
        name: A folder or hub id.
        dtype: The dtype that its weights would have.
        part, tokenizer_part: Folders in it where their files lie.

    Raises:
        ValueError: If it can't be read.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(name, subfolder=part)
        with torch.device("meta"):
            model = _auto(config).from_config(config, dtype=dtype, attn_implementation="sdpa")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, subfolder=tokenizer_part)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{name} can't be read: {error}") from None
    return model.eval(), tokenizer


def _auto(config: Any) -> Any:
    """What makes a model of a config."""
    if type(config) in transformers.AutoModelForImageTextToText._model_mapping:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM
