"""A video VAE in closed form: a PCA of 8x8 pixel patches, written into AutoencoderKLWan weights.

Nothing is trained here; `decoder.py` trains the decoder afterwards. The network's blocks are identities, its
normalisation is held constant by one large constant channel, and `silu(y) - silu(-y) == y` makes its
activation linear, so that encoder and decoder are exactly the linear maps of the PCA. Every frame stands
alone: time is compressed by the transformer's patches instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from torch import Tensor, nn

from sparse_dit.eval.draw import draw

PATCH = 8
CHANNELS = 16
_PIXELS = 3 * PATCH * PATCH
_WIDTH = 48
CONSTANT = 1200.0  # far above every latent (about 10), exact in bfloat16


@dataclass(frozen=True)
class Pca:
    """Mean `[192]`, basis `[192, 16]` (columns, largest first) and their deviations `[16]`."""

    mean: Tensor
    basis: Tensor
    deviation: Tensor


def fit_pca(num_clips: int = 160, seed: int = 3) -> Pca:
    """The PCA of the 8x8 patches of drawn clips of two frames, half of 64 and half of 128 px."""
    rng = Random(seed)
    clips = [draw(2, *((64, 64) if i % 2 else (128, 128)), rng)[0] for i in range(num_clips)]
    patches = torch.cat([patchify(clip[None], PATCH)[0].flatten(1) for clip in clips], 1).mT
    mean = patches.mean(0)
    centred = (patches - mean).double()
    basis, variance, _ = torch.linalg.svd(centred.mT @ centred / len(centred))
    return Pca(mean, basis[:, :CHANNELS].float(), variance[:CHANNELS].sqrt().float())


@torch.no_grad()
def build_vae(pca: Pca) -> AutoencoderKLWan:
    """An AutoencoderKLWan (compression 1x8x8, 16 channels) that computes the PCA.

    The pipeline's normalised latents get deviations from 1.25 downwards, as the square root of the
    PCA's: fine detail stays quieter than the picture, though less so than in the pixels.
    """
    gain = 8 / pca.deviation[0]
    wanted = 1.25 * (pca.deviation / pca.deviation[0]).sqrt()
    vae = AutoencoderKLWan(
        base_dim=_WIDTH,
        z_dim=CHANNELS,
        dim_mult=[1],
        num_res_blocks=1,
        temperal_downsample=[],
        patch_size=PATCH,
        in_channels=_PIXELS,
        out_channels=_PIXELS,
        scale_factor_temporal=1,
        scale_factor_spatial=PATCH,
        latents_mean=[0.0] * CHANNELS,
        latents_std=(pca.deviation * gain / wanted).tolist(),
    )
    for module in vae.modules():
        if type(module).__name__ == "WanResidualBlock":
            _zero(module.conv2)
        elif type(module).__name__ == "WanAttentionBlock":
            _zero(module.proj)
    eye = torch.eye(CHANNELS)
    forward = pca.basis.mT * gain
    _split(vae.encoder.conv_in, forward, -(forward @ pca.mean))
    _join(vae.encoder.conv_out, eye, torch.zeros(CHANNELS))
    vae.encoder.conv_out.bias[CHANNELS:] = -12  # log-variance: the posterior is its mean
    _split(vae.decoder.conv_in, eye, torch.zeros(CHANNELS))
    _join(vae.decoder.conv_out, pca.basis / gain, pca.mean)
    for half in (vae.encoder, vae.decoder):
        half.norm_out.gamma.fill_(CONSTANT / math.sqrt(_WIDTH))
    for conv in (vae.quant_conv, vae.post_quant_conv):
        _zero(conv)
        conv.weight[:, :, 0, 0, 0] = torch.eye(conv.weight.shape[0])
    return vae.eval()


def linear_vae(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """The closed form with the encoder of `vae`, whatever its decoder has learnt since."""
    forward = vae.encoder.conv_in.weight[:CHANNELS, :, -1, 1, 1].detach().float()
    gain = forward.norm(dim=1, keepdim=True)
    pca = fit_pca()
    deviation = pca.deviation * (8 / gain[0] / pca.deviation[0])
    return build_vae(replace(pca, basis=(forward / gain).mT, deviation=deviation))


class PatchEncoder:
    """`vae.encode` and the pipeline's normalisation as one matrix, read from the VAE's weights."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        conv = vae.encoder.conv_in
        std = torch.tensor(vae.config.latents_std)
        self._weight = conv.weight[:CHANNELS, :, -1, 1, 1].detach().float() / std[:, None]
        self._bias = conv.bias[:CHANNELS].detach().float() / std

    def __call__(self, video: Tensor) -> Tensor:
        """Normalised latents `[B, 16, T, H / 8, W / 8]` of a video `[B, 3, T, H, W]`."""
        latents = torch.einsum("zc,bcthw->bzthw", self._weight, patchify(video, PATCH))
        return latents + self._bias.view(1, -1, 1, 1, 1)


def _zero(layer: nn.Module) -> None:
    layer.weight.zero_()
    layer.bias.zero_()


def _split(conv: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Write `y = weight x + bias` as channels `y`, `-y` and the constant."""
    _zero(conv)
    count = len(weight)
    for sign, rows in ((1, slice(0, count)), (-1, slice(count, 2 * count))):
        conv.weight[rows, :, -1, 1, 1] = sign * weight
        conv.bias[rows] = sign * bias
    conv.bias[2 * count] = CONSTANT


def _join(conv: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Read `silu(y) - silu(-y) == y` back through `weight`."""
    _zero(conv)
    rows, count = weight.shape
    conv.weight[:rows, :count, -1, 1, 1] = weight
    conv.weight[:rows, count : 2 * count, -1, 1, 1] = -weight
    conv.bias[:rows] = bias
