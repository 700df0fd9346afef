"""A pipeline's transformers without memory for their weights, where only what they are is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .integrations.diffusers import COMPONENTS


def weightless(name: str) -> dict[str, nn.Module]:
    """The transformers of a pipeline, by component name, made from their configurations.

    Every weight is one zero that is seen everywhere, so they can't compute, and weigh nothing.

    Args:
        name: Folder or hub id of a diffusers pipeline.

    Raises:
        OSError: If a configuration can't be read.
    """
    import diffusers
    from accelerate import init_empty_weights
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    parts: dict[str, nn.Module] = {}
    index = Path(name) / "model_index.json"
    listed: Any = (
        json.loads(index.read_text(encoding="utf-8"))
        if index.is_file()
        else DiffusionPipeline.load_config(name)
    )
    for part in COMPONENTS:
        library, class_name = listed.get(part) or (None, None)
        kind: Any = getattr(diffusers, class_name or "", None)
        if library != "diffusers" or kind is None:
            continue  # absent, or code of its own, which the pipeline loads as it always does
        with init_empty_weights(include_buffers=False):
            module = kind.from_config(kind.load_config(name, subfolder=part))
        parts[part] = _zeros(module)
    return parts


def _zeros(module: nn.Module) -> nn.Module:
    zero = torch.zeros((), device="cpu")
    for owner in module.modules():
        for key, weight in owner.named_parameters(recurse=False):
            value = zero.to(weight.dtype).expand(weight.shape)
            setattr(owner, key, nn.Parameter(value, requires_grad=False))
    return module.eval()
