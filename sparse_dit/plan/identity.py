"""Which model a plan is for: a hash of its architecture, however its weights are stored or were loaded."""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from .document import place
from .errors import PlanError

# what hosts put into a configuration that says how weights are stored or were loaded; torchao, GGUF,
# bitsandbytes, quanto, ModelOpt and AutoRound all have their settings in the first
STORAGE = frozenset(
    {
        "quantization_config",
        "compression_config",
        "quantization",
        "quant_method",
        "dtype",
        "torch_dtype",
        "load_in_4bit",
        "load_in_8bit",
        "device_map",
        "low_cpu_mem_usage",
        "use_safetensors",
        "variant",
        "gguf_file",
        "transformers_version",
    }
)
# what a language model's configuration says of its training and use
USE = frozenset(
    {
        "architectures",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "use_cache",
        "id2label",
        "label2id",
        "initializer_range",
        "pretraining_tp",
    }
)
DIGITS = 6  # of a language model's numbers: a GGUF file holds them as float32
# places and types of memory, which are no architecture under any name
_MEMORY = (torch.dtype, torch.device)


def config_hash(config: Any) -> str:
    """SHA-256 of a model's architecture, the same for the same model in any process.

    Args:
        config: A mapping, or a configuration of transformers, of which only what differs from the defaults
            of its class counts, so that new defaults don't matter, to six digits, and nothing that its class
            doesn't know.

    Keys that start with "_" (where it came from, who wrote it), keys that say how weights are stored or
    were loaded (`STORAGE`, and whatever holds a torch dtype or device), and keys whose value is None (what a
    newer library added and the model doesn't use) don't count; tuples are lists, enumerations and NumPy
    numbers their values.

    Raises:
        PlanError: If a value is neither a number, text, nor made of them.
    """
    if hasattr(config, "to_diff_dict"):
        return sha256(_architecture(_known(config), STORAGE | USE))
    return sha256(_kept(config, STORAGE))


def _known(config: Any) -> dict[str, Any]:
    """What differs from the defaults; of a class of transformers itself only what that class reads."""
    given = config.to_diff_dict()
    if not type(config).__module__.startswith("transformers.") or not is_dataclass(config):
        return given
    known = {field.name for field in fields(config)} | {"model_type"}
    return {key: value for key, value in given.items() if key in known}


def _kept(config: Mapping[str, Any], without: Collection[str]) -> dict[str, Any]:
    return {
        str(key): _plain(value, ("config", str(key)))
        for key, value in config.items()
        if not str(key).startswith("_")
        and key not in without
        and value is not None
        and not isinstance(value, _MEMORY)
    }


def _architecture(config: Mapping[str, Any], without: Collection[str]) -> dict[str, Any]:
    """The same of a configuration whose parts (of text, of vision) are configurations too."""
    return {
        key: _architecture(value, without) if isinstance(value, Mapping) else _rounded(value)
        for key, value in _kept(config, without).items()
    }


def _rounded(value: Any) -> Any:
    """A number as files agree on it: to a few digits, and 1e4 as 10000."""
    if not isinstance(value, float):
        return value
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() else short


def sha256(document: Mapping[str, Any]) -> str:
    """The SHA-256 of a JSON document in hexadecimal digits; the order of keys doesn't matter."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _plain(value: Any, path: tuple[str | int, ...]) -> Any:
    """What JSON would give back if the configuration were saved and read."""
    if isinstance(value, enum.Enum):
        return _plain(value.value, path)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, _MEMORY):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(item, (*path, str(k))) for k, item in value.items()}
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if isinstance(value, list | tuple):
        return [_plain(item, (*path, i)) for i, item in enumerate(value)]
    if hasattr(value, "tolist"):  # NumPy's numbers and arrays
        return _plain(value.tolist(), path)
    raise PlanError(
        f"{place(path)}: a model is known by its configuration, whose values must be numbers, text, lists "
        f"or dicts, got {type(value).__name__}; a plan can be made for this model once it is one of these, "
        f"or None (register_to_config({path[1]}=None))"
    )
