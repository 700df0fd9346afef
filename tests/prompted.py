"""Tiny pipelines without text encoders or autoencoders as ones that take prompts and give pictures.

The search, the report and the check generate from prompts: these stand in for a model's own pipeline.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sparse_dit.generation import GenerationSettings

Texts = Callable[[str], dict[str, Any]]


def prompted(pipe: Any, call: dict[str, Any], texts: Texts | None = None) -> Any:
    """The pipeline, whose call now takes what `generate` gives; latents are made a picture.

    Args:
        pipe: A pipeline whose class' call takes embeddings.
        call: Its default arguments.
        texts: Arguments that depend on the prompt; by default noise is added to the prompt's embeddings,
            and they are cut where the model takes any length.
    """
    host = type(pipe)
    taken = inspect.signature(host.__call__).parameters
    options = {key: value for key, value in call.items() if key != "prompt"}

    def __call__(
        self, prompt, height, width, num_inference_steps, guidance_scale, generator,
        output_type, num_frames=1,
    ):  # fmt: skip
        wanted = {"num_inference_steps": num_inference_steps, "generator": generator}
        size = {"height": height, "width": width, "num_frames": num_frames}
        wanted |= {key: value for key, value in size.items() if key in taken and key in options}
        said = texts(prompt) if texts else _texts(call, prompt)
        out = host.__call__(self, **{**options, **said, **wanted})
        made = out.images if hasattr(out, "images") else out.frames
        return SimpleNamespace(images=[_picture(made)])

    pipe.__class__ = type(host.__name__, (host,), {"__call__": __call__})
    return pipe


def settings_of(call: dict[str, Any], steps: int = 2) -> GenerationSettings:
    """The size of a default call."""
    size = {key: call[key] for key in ("height", "width", "num_frames") if key in call}
    return GenerationSettings(**size, steps=steps, guidance=3.0)


def noise(prompt: str, *shape: int) -> Tensor:
    """Normal, the same for a prompt."""
    generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
    return torch.randn(*shape, generator=generator)


def _texts(call: dict[str, Any], prompt: str) -> dict[str, Any]:
    result = {}
    for key, value in call.items():
        if key.startswith("prompt_embeds") and isinstance(value, Tensor):
            mask = "mask" in key
            result[key] = value if mask else value + noise(prompt, *value.shape).to(value.dtype)
        elif key.startswith("prompt_embeds"):
            result[key] = [x + noise(prompt, *x.shape) for x in value]
    return result


def _picture(latents: Any) -> Any:
    """Latents of the first item as `[H, 1, 3]` in 0..1."""
    values = torch.as_tensor(latents[0]).float().flatten()
    return values[: len(values) // 3 * 3].sigmoid().reshape(-1, 1, 3).numpy()
