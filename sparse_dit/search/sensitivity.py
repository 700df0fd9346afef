"""How much an error in attention moves the final video, by noise level: measured, not assumed.

Noise of a known relative size is added to every head's output at the noise levels of one stage, and the
change of the finished video is measured. It is done at a reduced size, where a generation is cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..generation import Case, GenerationSettings, generate
from ..integrations.call import AttentionCall
from ..integrations.diffusers import attach, components
from ..plan import Stage

RELATIVE_NOISE = 0.1


class _Noise:
    """An intercept that adds noise to attention's output while sigma is inside a stage."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.calls = 0
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, call: AttentionCall) -> Tensor:
        out = call.stock()
        sigma = call.context.sigma
        if sigma is None or not self.stage.covers(sigma, "any"):
            return out
        self.calls += 1
        noise = torch.randn(out.shape, generator=self.generator).to(out)
        power = out.square().mean(dim=(1, 3), keepdim=True).sqrt()  # of each head
        return out + RELATIVE_NOISE * power * noise


def reduced(settings: GenerationSettings) -> GenerationSettings:
    """Half the height and width (in steps of 32 pixels, at least 64) and half the steps."""

    def half(size: int) -> int:
        return size if size <= 64 else max(64, round(size / 64) * 32)

    return replace(
        settings,
        height=half(settings.height),
        width=half(settings.width),
        steps=max(4, settings.steps // 2),
    )


def sensitivity(
    pipe: Any,
    component: str,
    stages: Sequence[Stage],
    case: Case,
    settings: GenerationSettings,
) -> list[float]:
    """Mean squared change of the video (in 0..1) for a squared relative error of 1 in every head.

    Args:
        pipe: Stock pipeline.
        component: Which transformer gets the noise.
        stages: Noise levels to test, one after the other.
        case: What to generate.
        settings: Size and steps of these runs; see `reduced`.

    Returns:
        One number a stage. A stage that no step of these runs falls into gets the larger number of the
        nearest stages on both sides.

    Raises:
        ValueError: If the pipeline gives NaN or Inf.
    """
    clean, _ = generate(pipe, case, settings)
    if not np.isfinite(clean).all():
        raise ValueError(
            f"the stock pipeline gives NaN or Inf for {case.prompt!r} at "
            f"{settings.width}x{settings.height}: it is broken at this size or dtype"
        )
    result: list[float | None] = []
    for stage in stages:
        noise = _Noise(stage)
        attachment = attach(components(pipe)[component], noise)
        try:
            video, _ = generate(pipe, case, settings)
        finally:
            attachment.detach()
        change = float(np.mean((video - clean) ** 2)) / RELATIVE_NOISE**2
        result.append(change if noise.calls else None)
    return filled(result)


def filled(values: Sequence[float | None]) -> list[float]:
    """Gaps filled with the larger one of the nearest known values on both sides.

    Raises:
        ValueError: If nothing is known.
    """
    if all(value is None for value in values):
        raise ValueError("no step of a generation falls into any recorded noise level")
    result = []
    for place in range(len(values)):
        before = [v for v in values[: place + 1] if v is not None][-1:]
        after = [v for v in values[place:] if v is not None][:1]
        result.append(max(before + after))
    return result
