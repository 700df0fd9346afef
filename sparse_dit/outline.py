"""A pipeline without its weights: what can be checked of it before gigabytes are read."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch


def outline(name: str, dtype: torch.dtype = torch.float32) -> Any | None:
    """The pipeline as its configuration files describe it, with its models on the meta device.

    Text encoders and tokenizers are left out. It can't generate, but its class, its transformers with
    their layers, and the sizes that it takes are those of the loaded pipeline.

    Args:
        name: Folder, or hub id (of which only the small configuration files are read).
        dtype: The dtype of its models' parameters.

    Returns:
        None for a pipeline that can't be made so: of a class that diffusers doesn't have, say.

    Raises:
        OSError, ValueError: If `name` has no readable `model_index.json`.
    """
    import diffusers
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    index: Any = DiffusionPipeline.load_config(name)
    if not isinstance(index, dict):
        raise ValueError(
            f"its model_index.json must hold a JSON object, got {type(index).__name__}"
        )
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        return None
    parts: dict[str, Any] = {}
    for part, parameter in list(inspect.signature(kind).parameters.items()):
        entry = index.get(part, parameter.default)
        if isinstance(entry, list | tuple) and len(entry) == 2:
            entry = _tried(_part, name, part, *entry, dtype)
        parts[part] = None if entry is inspect.Parameter.empty else entry
    return _tried(kind, **parts)


def _part(name: str, part: str, library: str | None, kind: str | None, dtype: torch.dtype) -> Any:
    """A model or scheduler of diffusers; None for what comes from elsewhere."""
    if library != "diffusers" or kind is None:
        return None
    made_of: Any = getattr(importlib.import_module(library), kind)
    config = made_of.load_config(name, subfolder=part)
    model = torch.nn.Module in made_of.__mro__
    with torch.device("meta") if model else nullcontext():
        made = made_of.from_config(config)
    if model:
        # not the model's own `to`, which warns of modules that loading keeps in float32
        torch.nn.Module.to(made, dtype)
    return made


def _tried(make: Callable[..., Any], *arguments: Any, **options: Any) -> Any | None:
    """What it makes; None if it needs what an outline doesn't have.

    Classes compute with their tensors, or ask text encoders, as they are made. What is wrong with the
    files shows again as they are loaded, in the host's own words.
    """
    try:
        return make(*arguments, **options)
    except (AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError):
        return None
