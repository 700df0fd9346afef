"""Single generations that comparisons are made of: recorded, with other rounding, with a dense plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..generation import Case, GenerationSettings, generate
from ..integrations.diffusers import AttentionCall, attach, components
from ..timing import Taken

NOISE_FLOOR = (
    "dense again, the same attention with its keys in reverse order: what rounding alone changes"
)


@dataclass(frozen=True)
class Recorded:
    """A generation with all that a comparison needs.

    Dense ones are kept so that several plans can be compared with the same one.

    Attributes:
        case: Prompt and seed.
        video: The frames, `[T, H, W, 3]` in 0..1.
        latents: The latents after each step, on the CPU.
        taken: What the whole pipeline call took.
    """

    case: Case
    video: np.ndarray
    latents: list[Tensor]
    taken: Taken


def dense_references(
    pipe: Any, cases: Iterable[Case], settings: GenerationSettings
) -> list[Recorded]:
    """Dense generations of all cases, for `evaluate(..., references=...)`."""
    return [record(pipe, case, settings) for case in cases]


def record(pipe: Any, case: Case, settings: GenerationSettings) -> Recorded:
    """One generation of the pipeline as it is, with the latents of every step."""
    latents: list[Tensor] = []
    video, taken = generate(
        pipe, case, settings, lambda step, timestep, x: latents.append(x.detach().cpu().clone())
    )
    return Recorded(case, video, latents, taken)


def noise_floor_video(pipe: Any, case: Case, settings: GenerationSettings) -> np.ndarray:
    """The case once more, dense, with every attention summed in reverse order of its keys.

    Mathematically the same video; how far it is off tells what rounding alone does to this model.
    """
    attached = [attach(part, _reversed_keys) for part in components(pipe).values()]
    try:
        return generate(pipe, case, settings)[0]
    finally:
        for attachment in attached:
            attachment.detach()


def _reversed_keys(call: AttentionCall) -> Tensor:
    if call.unsupported is not None:
        return call.stock()
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    mask = None
    if call.kv_len is not None:
        valid = torch.arange(k.shape[2], device=k.device) < call.kv_len[:, None].to(k.device)
        mask = valid.flip(-1)[:, None, None, :]
    out = scaled_dot_product_attention(q, k.flip(2), v.flip(2), mask, scale=call.scale)
    return out.transpose(1, 2)
