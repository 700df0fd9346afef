"""Train the embedded model's decoder alone, so that no seam shows between its 8x8 patches.

    python -m demos.tiny_wan.decoder demos/tiny_wan/model --out my_vae --cpu-seconds 3000

It starts from the linear decoder of `vae.py`, which sees no patch's neighbours. Encoder, latents and
transformer stay as they are, and so do plans. Every frame still stands alone: only the last tap in time of
each convolution is trained, in two dimensions. The two files that it writes take the place of those in the
pipeline's folder `vae`. Ctrl-C keeps a checkpoint beside the output; the same command goes on from it.
"""

from __future__ import annotations

import argparse
import copy
import math
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from diffusers.utils import logging
from torch import Tensor, nn
from torch.nn.functional import conv2d

from demos.tiny_wan.budget import add_budget, resumed, train
from demos.tiny_wan.folder import clean
from demos.tiny_wan.vae import CHANNELS, CONSTANT, PATCH, PatchEncoder, linear_vae
from sparse_dit.eval.draw import draw
from sparse_dit.whole_file import whole_file, whole_folder

SIDES = ((64, 16), (128, 8), (192, 4), (256, 2))  # pixels, frames in a batch
LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
EMA = 0.998
NOISE = 0.25  # the most noise in a latent, whose deviations are 1.25 and less
SCALE = 4.0  # what the norms divide by, so that features are about 1
SEAM = 4.0  # how much a step of the error across a border counts, times one elsewhere


class Plane(nn.Module):
    """A causal convolution over one frame: its last tap in time, as a 2-D convolution."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight[:, :, -1].detach().clone())
        self.bias = nn.Parameter(conv.bias.detach().clone())

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        """`[B, C, 1, h, w]` to `[B, out, 1, h, w]`."""
        padding = self.weight.shape[-1] // 2
        return conv2d(x[:, :, 0], self.weight, self.bias, padding=padding).unsqueeze(2)

    def write(self, conv: nn.Conv3d) -> None:
        """Into the last tap of the convolution that it was made of."""
        conv.weight.zero_()
        conv.weight[:, :, -1] = self.weight
        conv.bias.copy_(self.bias)


@torch.no_grad()
def planar(decoder: nn.Module) -> nn.Module:
    """A copy of the linear decoder for single frames whose blocks can learn.

    Its outputs are the same. The large constant channel keeps every norm constant; here the norms divide by
    `SCALE` instead, and nothing but them sees the constant.
    """
    model = copy.deepcopy(decoder)
    width = model.conv_in.weight.shape[0]
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Conv3d):
                setattr(module, name, Plane(child))
            elif type(child).__name__ == "WanRMS_norm" and child.gamma.ndim == 4:
                child.gamma.fill_(CONSTANT / math.sqrt(width) / SCALE)
                child.gamma[2 * CHANNELS] = 0
        if type(module).__name__ == "WanResidualBlock":
            nn.init.kaiming_normal_(module.conv1.weight, nonlinearity="relu")
            module.conv1.bias.zero_()
    model.conv_out.weight.mul_(SCALE)
    return model


@torch.no_grad()
def write_decoder(model: nn.Module, vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """A copy of `vae` with the trained decoder."""
    vae = copy.deepcopy(vae)
    trained = dict(model.named_modules())
    state = {n: p for n, p in model.state_dict().items() if n.endswith("gamma")}
    vae.decoder.load_state_dict(state, strict=False)
    for name, module in vae.decoder.named_modules():
        plane = trained[name]
        if isinstance(plane, Plane):
            plane.write(module)
    return vae


def error_of(found: Tensor, true: Tensor) -> Tensor:
    """Loss of frames `[B, 3, 1, H, W]`: absolute error, and that of its steps from pixel to pixel."""
    error = (found - true).squeeze(2)
    loss = error.abs().mean() + 4 * error.square().mean()
    for axis in (-1, -2):
        step = error.diff(dim=axis).abs().transpose(axis, -1)
        weight = torch.ones(step.shape[-1])
        weight[PATCH - 1 :: PATCH] = SEAM
        loss = loss + (step * weight).mean()
    return loss


class Training:
    """All that changes while training, and all that a checkpoint holds."""

    def __init__(self, vae: AutoencoderKLWan, seed: int, lr: float) -> None:
        torch.manual_seed(seed)
        self.model = planar(linear_vae(vae).decoder)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.rng, self.step, self.cpu_seconds, self.lr = Random(seed), 0, 0.0, lr
        # the attention is an identity, as it was
        parameters = [p for n, p in self.model.named_parameters() if "attentions" not in n]
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0)
        self.parameters = parameters
        self.encode = PatchEncoder(vae)
        self.std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)

    def train_step(self, progress: float) -> float:
        side, count = self.rng.choice(SIDES)
        true = torch.stack([draw(1, side, side, self.rng)[0] for _ in range(count)])
        generator = torch.Generator().manual_seed(self.rng.getrandbits(48))
        level = torch.rand(count, 1, 1, 1, 1, generator=generator).square() * NOISE
        latents = self.encode(true)
        latents = latents + level * torch.randn(latents.shape, generator=generator)
        loss = error_of(unpatchify(self.model(latents * self.std), PATCH), true)
        loss.backward()
        share = min(1.0, (self.step + 1) / WARMUP_STEPS) * max(0.02, min(1.0, 2 * (1 - progress)))
        self.optimizer.param_groups[0]["lr"] = self.lr * share
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        keep = min(EMA, self.step / (self.step + 9))
        current = [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(list(self.average.parameters()), current, 1 - keep)
        return loss.item()

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.getstate(),
            "counts": (self.step, self.cpu_seconds),
        }
        with whole_file(path) as file:
            torch.save(state, file)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.setstate(state["rng"])
        self.step, self.cpu_seconds = state["counts"]


def main(argv: list[str] | None = None) -> None:
    """Train until the budget is spent, and write the folder now and then and at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="pipeline folder whose VAE is trained")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the VAE to")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    add_budget(parser, log_every=100)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    vae = AutoencoderKLWan.from_pretrained(args.folder / "vae").to(torch.float32)
    training = Training(vae, args.seed, args.lr)
    checkpoint = args.out.with_name(args.out.name + ".checkpoint")
    resumed(training, checkpoint)
    train(training, args, checkpoint, partial(_write, training, vae, args.out))


def _write(training: Training, vae: AutoencoderKLWan, out: Path) -> None:
    with whole_folder(out) as folder:
        write_decoder(training.average, vae).to(torch.bfloat16).save_pretrained(folder)
        clean(folder / "config.json")


if __name__ == "__main__":
    main()
