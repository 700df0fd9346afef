"""Pipelines of diffusers from a folder or the hub: whole, or without what takes gigabytes to read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from .attachment import COMPONENTS


def load(name: str, dtype: torch.dtype, weights: bool = True) -> Any:
    """The pipeline, on the CPU; without `weights` its transformers can't compute, and weigh nothing.

    Args:
        name: Folder, or hub id (which may download it).
        dtype: The dtype of its models' parameters.
        weights: Whether its transformers are read.
    """
    from transformers.utils.logging import disable_progress_bar

    diffusers.utils.logging.disable_progress_bar()
    disable_progress_bar()
    if is_modular(name):
        return _modular(name, dtype, weights)
    # the old keyword warns in new versions, the new one is ignored by old versions
    old = tuple(int(part) for part in version("diffusers").split(".")[:2]) < (0, 42)
    options = {"torch_dtype" if old else "dtype": dtype}
    parts = {} if weights else weightless(name)
    return DiffusionPipeline.from_pretrained(name, **options, **parts)


def outline(name: str, dtype: torch.dtype = torch.float32) -> Any | None:
    """The pipeline as its configuration files describe it, with its models on the meta device.

    Text encoders and tokenizers are left out. It can't generate, but its class, its transformers with
    their layers, and the sizes that it takes are those of the loaded pipeline.

    Args:
        name: Folder, or hub id (of which only the small configuration files are read).
        dtype: The dtype of its models' parameters.

    Returns:
        None for a pipeline that can't be made so: a modular one, or of a class that diffusers doesn't have.

    Raises:
        OSError, ValueError: If `name` has no readable `model_index.json`.
    """
    if is_modular(name):
        return None
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
            entry = _tried(_described, name, part, entry, torch.device("meta"))
            if isinstance(entry, nn.Module):
                # not the model's own `to`, which warns of modules that loading keeps in float32
                nn.Module.to(entry, dtype)
        parts[part] = None if entry is inspect.Parameter.empty else entry
    return _tried(kind, **parts)


def is_modular(name: str) -> bool:
    """Whether a folder or hub id holds a modular pipeline, and no stock one."""
    try:
        DiffusionPipeline.load_config(name)
        return False
    except OSError:
        pass
    try:
        ModularPipeline.load_config(name)
    except OSError:
        return False
    return True


def _modular(name: str, dtype: torch.dtype, weights: bool) -> Any:
    """A modular pipeline, cut to what makes something of a prompt alone if it says what that is.

    Raises:
        ValueError: If a component can't be read.
    """
    pipe = ModularPipeline.from_pretrained(name)
    workflows: Any = getattr(pipe.blocks, "_workflow_map", None) or {}
    of_prompts = next((key for key, needs in workflows.items() if needs == {"prompt": True}), None)
    if of_prompts is not None:
        pipe = ModularPipeline.from_pretrained(name, workflow=of_prompts)
    wanted = set(pipe.null_component_names)
    made = set() if weights else wanted & set(COMPONENTS)
    pipe.load_components(names=sorted(wanted - made), dtype=dtype)
    for part in made:
        spec = pipe.get_component_spec(part)
        entry = ("diffusers", getattr(spec.type_hint, "__name__", None))
        place = init_empty_weights(include_buffers=False)
        module = _described(spec.pretrained_model_name_or_path, spec.subfolder, entry, place)
        pipe.update_components(**{part: _zeros(module)})
    if missing := pipe.null_component_names:
        raise ValueError(
            f"all components must load, but {', '.join(sorted(missing))} didn't (see the log): is what "
            "they need installed, and are their files there?"
        )
    return pipe


def weightless(name: str) -> dict[str, nn.Module]:
    """The transformers of a pipeline, by component name, made from their configurations.

    Every weight is one zero that is seen everywhere.

    Raises:
        OSError: If a configuration can't be read.
    """
    index: Any = DiffusionPipeline.load_config(name)
    parts = {}
    for part in COMPONENTS:
        module = _described(name, part, index.get(part), init_empty_weights(include_buffers=False))
        if module is not None:
            parts[part] = _zeros(module)
    return parts


def _zeros(module: nn.Module) -> nn.Module:
    zero = torch.zeros((), device="cpu")
    for owner in module.modules():
        for key, weight in owner.named_parameters(recurse=False):
            value = zero.to(weight.dtype).expand(weight.shape)
            setattr(owner, key, nn.Parameter(value, requires_grad=False))
    return module.eval()


def _described(
    name: Any,
    part: Any,
    entry: Sequence[str | None] | None,
    place: AbstractContextManager[Any],
) -> Any:
    """A model or scheduler as its configuration describes it, a model's parameters in `place`.

    `entry` is its library and class. The result is None for what is absent or isn't of diffusers, which the
    pipeline loads as it always does.
    """
    library, kind = entry or (None, None)
    made_of: Any = getattr(diffusers, kind or "", None)
    if library != "diffusers" or made_of is None:
        return None
    config = made_of.load_config(name, subfolder=part)
    with place if nn.Module in made_of.__mro__ else nullcontext():
        return made_of.from_config(config)


def _tried(make: Callable[..., Any], *arguments: Any, **options: Any) -> Any | None:
    """What it makes; None if it needs what an outline doesn't have.

    Classes compute with their tensors, or ask text encoders, as they are made. What is wrong with the
    files shows again as they are loaded, in the host's own words.
    """
    try:
        return make(*arguments, **options)
    except (AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError):
        return None


def add_lora(pipe: Any, file: Path) -> None:
    """Load LoRA weights and add them into the model's own.

    Raises:
        NotImplementedError: If the pipeline takes none.
        ValueError: If the file holds none for its transformer.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise NotImplementedError(f"{type(pipe).__name__} takes no LoRA weights")
    pipe.load_lora_weights(file.parent, weight_name=file.name, local_files_only=True)
    if not any(name.startswith("transformer") for name in pipe.get_list_adapters()):
        raise ValueError(
            f"--lora: {file} must hold weights for {type(pipe).__name__}'s transformer, none of its "
            "names fit; save it with the pipeline's own save_lora_weights"
        )
    pipe.fuse_lora()
