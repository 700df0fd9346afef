"""What tells models, and what they are given, apart: hashes, to find out whether a file is of the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor, nn, uint8

from .integrations import self_attention_layers
from .plan import config_hash

SAMPLED = 8  # values of each weight by which models are told apart


def fingerprint(modules: Mapping[str, nn.Module]) -> str:
    """What tells models apart, also by a LoRA: architecture, and a sample of the attention's weights.

    Args:
        modules: A model's transformers, by component name.
    """
    found = hashlib.sha256()
    for name, module in modules.items():
        found.update(f"{name} {type(module).__name__} {config_hash(module.config)}".encode())
        for path, layer in self_attention_layers(module).items():
            for inner, part in layer.named_modules():
                if (scaling := getattr(part, "scaling", None)) is not None:
                    found.update(f"{path} {inner} {scaling}".encode())
            for inner, weight in layer.named_parameters():
                found.update(f"{path} {inner} {tuple(weight.shape)}".encode())
                found.update(_sample(weight))
    return found.hexdigest()


def _sample(weight: Tensor) -> bytes:
    """Some values; nothing of weights whose values can't be had, as those of offloaded layers."""
    try:
        some = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED)]
        return json.dumps(some.float().tolist()).encode()
    except (NotImplementedError, RuntimeError):
        return b""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of tensors with their names, types and shapes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.cpu().contiguous().flatten().view(uint8).numpy().tobytes())
    return found.hexdigest()
