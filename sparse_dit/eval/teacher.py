"""The teacher-forced error: one-step predictions on real clips, sparse against dense.

Unlike whole generations, it doesn't depend on what the model manages to generate, nor do early
differences grow over the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..integrations import host_of
from ..on_cpu import on_cpu
from ..patch import patch
from ..plan import Plan
from .metrics import flat_psnr, mean_db, psnr, relative_error


@dataclass(frozen=True)
class TeacherForced:
    """Means over the clips at one noise level.

    Attributes:
        sigma: Noise level: the input is `(1 - sigma) * clip + sigma * noise`.
        velocity_error: Relative L2 error of the predicted velocity, sparse against dense.
        psnr_db: PSNR of the decoded clean clip that the velocity implies, sparse against dense.
        psnr_flat_db: PSNR of the dense clean clip against its own mean colour.
        clips: How many clips the means are over.
    """

    sigma: float
    velocity_error: float
    psnr_db: float
    psnr_flat_db: float
    clips: int


@dataclass(frozen=True)
class _Noised:
    latents: Tensor
    prompt: Tensor
    sigma: float


@dataclass(frozen=True)
class _Asked:
    prompts: tuple[str, ...]
    sigmas: tuple[float, ...]
    seed: int
    max_sequence_length: int


@dataclass(frozen=True, eq=False)
class DensePredictions:
    """Noised clips and the stock pipeline's predictions for them, to compare several plans with.

    Attributes:
        asked: The prompts, noise levels, seed and text length that they were made with.
        inputs: The noised clips, for each clip one at each noise level.
        velocities: The predicted velocities, float32 `[1, C, T, H, W]`, one for each input.
        videos: The clean clips that the velocities imply, `[T, H, W, 3]` in 0..1.
    """

    asked: _Asked
    inputs: list[_Noised]
    velocities: list[Tensor]
    videos: list[np.ndarray]


@torch.no_grad()
@on_cpu
def teacher_forced(
    pipe: Any,
    plan: Plan,
    clips: Sequence[tuple[Tensor, str]],
    sigmas: Sequence[float],
    seed: int = 0,
    *,
    max_sequence_length: int = 512,
    backend: str = "auto",
    dense: DensePredictions | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[TeacherForced]:
    """The transformer's one-step prediction on noised clips, sparse against dense.

    Args:
        pipe: A stock pipeline, a WanPipeline; stock again on return.
        plan: What to measure.
        clips: Video `[3, T, H, W]` in -1..1 and its prompt, as `eval.draw.draw` gives them.
        sigmas: Noise levels in (0, 1].
        seed: The seed of the noise; each clip has one noise for all levels.
        max_sequence_length: The number of text tokens that prompts are padded or cut to.
        backend: The backend of sparse attention, as `patch` takes it.
        dense: What `dense_predictions` gave for the same pipeline, clips, sigmas, seed and length;
            saves predicting it again for every plan.
        progress: Called with a line of text before each pass.

    Returns:
        One entry for each sigma, in the given order.

    Raises:
        NotImplementedError: If single predictions of the pipeline can't be had; they can of a WanPipeline.
        ValueError: If there are no clips or sigmas, a sigma is out of range, the model can't take a clip, or
            `dense` is of something else.
    """
    say, model = progress or (lambda text: None), host_of(pipe).one_step(pipe)
    asked = _Asked(tuple(prompt for _, prompt in clips), tuple(sigmas), seed, max_sequence_length)
    if dense is None:
        dense = dense_predictions(
            pipe, clips, sigmas, seed, max_sequence_length=max_sequence_length, progress=progress
        )
    elif dense.asked != asked:
        raise ValueError(f"dense predictions must be of the same request, got {dense.asked}")
    say(f"teacher-forced, sparse: {len(dense.inputs)} predictions")
    # a single prediction has no other steps
    with patch(pipe, plan, backend=backend, step_cache=False):
        sparse = [model.velocity(x.latents, x.sigma, x.prompt) for x in dense.inputs]
    return _by_sigma(model, dense, sparse, len(sigmas))


@torch.no_grad()
@on_cpu
def dense_predictions(
    pipe: Any,
    clips: Sequence[tuple[Tensor, str]],
    sigmas: Sequence[float],
    seed: int = 0,
    *,
    max_sequence_length: int = 512,
    progress: Callable[[str], None] | None = None,
) -> DensePredictions:
    """The dense predictions that `teacher_forced` compares with; same arguments, same errors raised."""
    model = host_of(pipe).one_step(pipe)
    if not clips or not sigmas or not all(0 < sigma <= 1 for sigma in sigmas):
        raise ValueError(f"clips and sigmas in (0, 1] are needed, got {len(clips)} and {sigmas}")
    say = progress or (lambda text: None)
    noise = torch.Generator("cpu").manual_seed(seed)
    inputs: list[_Noised] = []
    for clip, prompt in clips:
        clean = model.encode(clip)
        drawn = torch.randn(clean.shape, generator=noise, dtype=torch.float32).to(clean)
        text = model.text(prompt, max_sequence_length)
        inputs += [_Noised((1 - s) * clean + s * drawn, text, s) for s in sigmas]
    say(f"teacher-forced, dense: {len(inputs)} predictions")
    velocities = [model.velocity(x.latents, x.sigma, x.prompt) for x in inputs]
    asked = _Asked(tuple(prompt for _, prompt in clips), tuple(sigmas), seed, max_sequence_length)
    videos = [_clean(model, *pair) for pair in zip(inputs, velocities, strict=True)]
    return DensePredictions(asked, inputs, velocities, videos)


def _by_sigma(
    model: Any, dense: DensePredictions, sparse: list[Tensor], num_sigmas: int
) -> list[TeacherForced]:
    results = []
    for first in range(num_sigmas):
        errors, likeness, flat = [], [], []
        for at in range(first, len(dense.inputs), num_sigmas):
            errors.append(relative_error(sparse[at], dense.velocities[at]))
            likeness.append(psnr(_clean(model, dense.inputs[at], sparse[at]), dense.videos[at]))
            flat.append(flat_psnr(dense.videos[at]))
        results.append(
            TeacherForced(
                sigma=dense.inputs[first].sigma,
                velocity_error=float(np.mean(errors)),
                psnr_db=mean_db(likeness),
                psnr_flat_db=mean_db(flat),
                clips=len(errors),
            )
        )
    return results


def _clean(model: Any, item: _Noised, velocity: Tensor) -> np.ndarray:
    """The clean clip that a prediction implies, `[T, H, W, 3]` in 0..1."""
    return model.decode(item.latents - item.sigma * velocity)
