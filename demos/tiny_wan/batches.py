"""What one training step sees: drawn clips of one size, noise levels, text with padding.

Sizes are latent frames x rows x columns; a token is two frames of one latent pixel. Short clips
with large frames and long clips with small frames show every axis of the position embedding its
full range, up to 9 x 32 x 32, at a fraction of the cost of a clip that is large in all three.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from sparse_dit.eval.draw import draw

TEXT_LEN = 20
NOISE_SHIFT = 2.2


@dataclass(frozen=True)
class Bucket:
    """A clip size in latents, how many of them make a batch, and its weight in the lottery.

    `weight` runs linearly from the first number, at the start of the training, to the second.
    """

    frames: int
    height: int
    width: int
    batch: int
    weight: tuple[float, float]


# tokens x batch; the last column says what the size is there for
BUCKETS = (
    Bucket(8, 8, 8, 8, (6, 0.5)),  # 256 x 8: composition, cheaply
    Bucket(16, 8, 8, 4, (5, 2)),  # 512 x 4: motion
    Bucket(18, 8, 8, 4, (0, 1)),  # 576 x 4: the ninth pair of frames
    Bucket(8, 12, 12, 4, (2, 1)),  # 576 x 4
    Bucket(4, 16, 16, 4, (1, 2)),  # 512 x 4
    Bucket(16, 12, 12, 2, (0.5, 2)),  # 1,152 x 2
    Bucket(8, 16, 16, 2, (0.5, 3)),  # 1,024 x 2
    Bucket(8, 12, 20, 2, (0.3, 0.7)),  # 960 x 2: wide
    Bucket(8, 20, 12, 2, (0.3, 0.7)),  # 960 x 2: tall
    Bucket(16, 16, 16, 1, (0.2, 3)),  # 2,048
    Bucket(4, 24, 24, 2, (0, 2.5)),  # 1,152 x 2
    Bucket(4, 32, 32, 1, (0, 2.5)),  # 2,048
    Bucket(8, 24, 24, 1, (0, 2)),  # 2,304
    Bucket(16, 24, 24, 1, (0, 1)),  # 4,608
)


@dataclass(frozen=True)
class Batch:
    """Latents `[B, 16, T, h, w]`, noise levels `[B]`, text `[B, L, dim]`, its log-weights."""

    latents: Tensor
    sigma: Tensor
    noise: Tensor
    text: Tensor
    text_bias: Tensor

    @property
    def noisy(self) -> Tensor:
        return torch.lerp(self.latents, self.noise, self.sigma.view(-1, 1, 1, 1, 1))


def choose_bucket(progress: float, rng: Random, buckets: tuple[Bucket, ...] = BUCKETS) -> Bucket:
    """A bucket for a training that is `progress`, 0..1, through its budget."""
    weights = [(1 - progress) * b.weight[0] + progress * b.weight[1] for b in buckets]
    return rng.choices(buckets, weights)[0]


def make_batch(
    bucket: Bucket,
    encode_video: Callable[[Tensor], Tensor],
    encode_text: Callable[[list[str], int], tuple[Tensor, Tensor]],
    rng: Random,
    noise_shift: float = NOISE_SHIFT,
) -> Batch:
    """Draw clips, drop one prompt in ten, choose noise levels.

    `noise_shift` is for pictures of 8 x 8 latents; larger ones need more noise to be as unclear.
    """
    shift = noise_shift * (bucket.height * bucket.width / 64) ** 0.3
    size = bucket.frames, bucket.height * 8, bucket.width * 8
    clips, prompts = zip(*(draw(*size, rng) for _ in range(bucket.batch)), strict=True)
    latents = encode_video(torch.stack(clips))
    text, mask = encode_text(["" if rng.random() < 0.1 else p for p in prompts], TEXT_LEN)
    generator = torch.Generator().manual_seed(rng.getrandbits(48))
    return Batch(
        latents=latents,
        sigma=sample_sigma(bucket.batch, shift, rng),
        noise=torch.randn(latents.shape, generator=generator),
        text=text,
        text_bias=_pad_bias(mask, rng.choice((20, 32, 32, 32, 64, 128, 226, 512))),
    )


def sample_sigma(count: int, shift: float, rng: Random) -> Tensor:
    """Noise levels `[count]` in 0..1: nine in ten shifted logit-normal, the others uniform."""
    levels = []
    for _ in range(count):
        level = 1 / (1 + math.exp(-rng.gauss(0, 1)))
        level = shift * level / (1 + (shift - 1) * level)
        levels.append(rng.random() if rng.random() < 0.1 else level)
    return torch.tensor(levels)


def _pad_bias(mask: Tensor, length: int) -> Tensor:
    """Logit bias `[B, 1, 1, L]` by which the pads of `mask` weigh as much as `length` would have.

    WanPipeline attends to its zero padding, so a longer `max_sequence_length` changes the video;
    training with many lengths, at the cost of a short one, teaches the model to bear it.
    """
    text = mask.sum(1, keepdim=True)
    pads = torch.log((length - text) / (mask.shape[1] - text))
    return torch.where(mask, 0.0, pads)[:, None, None, :]
