"""Single generations that comparisons are made of: recorded, with other rounding, with a dense plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..call import AttentionCall
from ..generation import Case
from ..integrations import Workload, attached, components
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


def record(work: Workload, case: Case) -> Recorded:
    """One generation of the model as it is, with the latents of every step.

    Raises:
        ValueError: If it reports no steps.
    """
    latents: list[Tensor] = []
    video, taken = work.run(case, lambda x: latents.append(x.detach().cpu().clone()))
    if not latents:
        raise ValueError(f"{type(work.model).__name__} reports no steps, which a comparison needs")
    return Recorded(case, video, latents, taken)


def noise_floor_video(work: Workload, case: Case) -> np.ndarray:
    """The case once more, dense, with every attention summed in reverse order of its keys.

    Mathematically the same video; how far it is off tells what rounding alone does to this model.
    """
    with attached(work.model, dict.fromkeys(components(work.model), _reversed_keys)):
        return work.run(case)[0]


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
