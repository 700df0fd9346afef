"""Language models and VLMs from a folder or the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers


def check(name: str) -> None:
    """Raise ValueError unless the name is a model's folder or could be one on the hub."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name} has no config.json: it must be a model of transformers")
    elif folder.exists():
        raise ValueError(f"{name} is a file: give the folder of a model of transformers")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ValueError(f"no folder {name}: give a model's folder or hub id")


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
