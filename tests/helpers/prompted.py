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
        pipe: A pipeline.
        call: Its default arguments.
        texts: Arguments that depend on the prompt; by default `padded` or `cut` of the call's embeddings, as
            the model takes a mask or not.
    """
    host = type(pipe)
    taken = inspect.signature(host.__call__).parameters
    options = {key: value for key, value in call.items() if key != "prompt"}
    masked = any(key.startswith("prompt") and "mask" in key for key in call)
    texts = texts or (padded if masked else cut)(call)

    def __call__(
        self, prompt, height, width, num_inference_steps, guidance_scale, generator,
        output_type, num_frames=1,
    ):  # fmt: skip
        wanted = {"num_inference_steps": num_inference_steps, "generator": generator}
        size = {"height": height, "width": width, "num_frames": num_frames}
        wanted |= {key: value for key, value in size.items() if key in taken and key in options}
        out = host.__call__(self, **{**options, **texts(prompt), **wanted})
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


def padded(call: dict[str, Any]) -> Texts:
    """Embeddings of one length, of which the first tokens are valid: one for each word."""

    def texts(prompt: str) -> dict[str, Any]:
        words, result = len(prompt.split()), _embeddings(call, prompt)
        for key, mask in call.items():
            if key.startswith("prompt") and "mask" in key:
                valid = torch.arange(mask.shape[-1]) < words
                result[key] = valid.to(mask.dtype).expand_as(mask).clone()
        return result

    return texts


def cut(call: dict[str, Any], *, both: bool = False) -> Texts:
    """Embeddings of as many tokens as the prompt has words; masks, if any, are cut too.

    Args:
        call: Default arguments.
        both: Whether those of the other half of guidance must be of the same length.
    """
    halves = ("prompt_", "negative_prompt_") if both else ("prompt_",)

    def texts(prompt: str) -> dict[str, Any]:
        words, told = len(prompt.split()), {**call, **_embeddings(call, prompt)}
        result = {}
        for key, value in told.items():
            if not key.startswith(halves) or value is None:
                continue
            if "mask" in key:
                result[key] = torch.ones_like(value[..., :words])
            elif "embeds" in key:
                listed = isinstance(value, list)
                result[key] = [x[:words] for x in value] if listed else value[..., :words, :]
        return result

    return texts


def _embeddings(call: dict[str, Any], prompt: str) -> dict[str, Any]:
    """Those of the call with noise that depends on the prompt."""
    result = {}
    for key, value in call.items():
        if not key.startswith("prompt_embeds") or "mask" in key:
            continue
        if isinstance(value, list):
            result[key] = [x + noise(prompt, *x.shape) for x in value]
        else:
            result[key] = value + noise(prompt, *value.shape).to(value.dtype)
    return result


def _picture(latents: Any) -> Any:
    """Latents of the first item as `[H, 1, 3]` in 0..1."""
    values = torch.as_tensor(latents[0]).float().flatten()
    return values[: len(values) // 3 * 3].sigmoid().reshape(-1, 1, 3).numpy()
