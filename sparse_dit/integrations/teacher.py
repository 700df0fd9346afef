"""Single predictions of a pipeline's transformers on given videos, which the report compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class OneStep:
    """What a WanPipeline predicts in one step, on videos that are given rather than generated.

    Args:
        pipe: The pipeline.

    Raises:
        NotImplementedError: If it isn't a WanPipeline.
    """

    pipe: Any

    def __post_init__(self) -> None:
        if (kind := type(self.pipe).__name__) != "WanPipeline":
            raise NotImplementedError(
                f"the teacher-forced error is written for WanPipeline, got {kind}"
            )

    def frames(self, wanted: int) -> int:
        """The frames that the pipeline makes where so many are asked for."""
        step = self.pipe.vae_scale_factor_temporal
        return wanted if wanted % step == 1 else wanted // step * step + 1

    def text(self, prompt: str, max_sequence_length: int) -> Tensor:
        """A prompt as the transformers take it."""
        return self.pipe.encode_prompt(
            prompt=prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
            device=self.pipe.device,
        )[0]

    def velocity(self, latents: Tensor, sigma: float, text: Tensor) -> Tensor:
        """The prediction at a noise level, float32, of the shape of the noised latents `[1, C, T, H, W]`."""
        pipe = self.pipe
        scale = pipe.scheduler.config.num_train_timesteps
        boundary = pipe.config.boundary_ratio
        high = boundary is None or sigma >= boundary
        transformer = pipe.transformer if high else pipe.transformer_2
        with transformer.cache_context("cond"):
            return transformer(
                hidden_states=latents.to(transformer.dtype),
                timestep=torch.tensor([sigma * scale], device=latents.device),
                encoder_hidden_states=text.to(transformer.dtype),
                return_dict=False,
            )[0].float()

    def encode(self, clip: Tensor) -> Tensor:
        """A clip `[3, T, H, W]` in -1..1 as the loop has it: normalised latents `[1, C, T', H', W']`.

        Raises:
            ValueError: If the transformer can't take the clip's size.
        """
        if clip.ndim != 4 or clip.shape[0] != 3:
            raise ValueError(f"a clip must be [3, T, H, W], got {tuple(clip.shape)}")
        pipe, vae, frames = self.pipe, self.pipe.vae, clip.shape[1]
        # AutoencoderKLWan reads 1 + 4n frames and drops the rest; it is causal, so padding is harmless
        missing = -(frames - 1) % 4
        padded = torch.cat([clip, clip[:, -1:].expand(-1, missing, -1, -1)], dim=1)
        encoded = vae.encode(padded[None].to(pipe.device, vae.dtype)).latent_dist.mode()
        encoded = encoded[:, :, : (frames - 1) // pipe.vae_scale_factor_temporal + 1].float()
        config = (pipe.transformer or pipe.transformer_2).config
        for name, side, step in zip(
            ("frames", "rows", "columns"), encoded.shape[2:], config.patch_size, strict=True
        ):
            if side % step:
                raise ValueError(
                    f"a clip of {tuple(clip.shape[1:])} makes {side} latent {name}, "
                    f"which must be a multiple of {step}"
                )
        mean, std = _statistics(vae, encoded)
        return (encoded - mean) / std

    def decode(self, latents: Tensor) -> np.ndarray:
        """Video `[T, H, W, 3]` in 0..1 of normalised latents."""
        vae = self.pipe.vae
        mean, std = _statistics(vae, latents)
        decoded = vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
        video = (decoded[0].float() / 2 + 0.5).clamp(0, 1)
        return rearrange(video, "channels t h w -> t h w channels").cpu().numpy()


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(like)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
