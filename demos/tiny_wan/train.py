"""Train the embedded text-to-video model from nothing on one CPU, and write it as a WanPipeline.

    python -m demos.tiny_wan.train --out my_model --cpu-seconds 3000

The budget and the learning rate follow the process's CPU time, so that a busy machine changes
neither. Ctrl-C keeps a checkpoint beside the output; the same command goes on from it.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.utils import logging
from torch import Tensor, nn

from demos.tiny_wan.batches import NOISE_SHIFT, Batch, choose_bucket, make_batch
from demos.tiny_wan.folder import SHIFT, new_pipeline, write_pipeline
from demos.tiny_wan.text import encode
from demos.tiny_wan.vae import PatchEncoder
from sparse_dit.whole_file import whole_file

MUON_LR = 4e-3
ADAM_LR = 2e-3
WARMUP_STEPS = 60
DECAY_FROM = 0.5
EMA = 0.997


class PaddedTextAttention(WanAttnProcessor):
    """Cross-attention with a bias on the text's padding; see `batches._pad_bias`."""

    bias: Tensor | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *_, **__):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias)


@dataclass
class Training:
    """All that changes while training, and all that a checkpoint holds."""

    model: nn.Module
    lr: float
    rng: Random
    step: int = 0
    tokens: int = 0
    cpu_seconds: float = 0.0
    ema: nn.Module = field(init=False)
    optimizers: list[torch.optim.Optimizer] = field(init=False)

    def __post_init__(self) -> None:
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        matrices = {n: p for n, p in self.model.named_parameters() if _is_block_matrix(n, p)}
        others = [p for n, p in self.model.named_parameters() if n not in matrices]
        self.optimizers = [
            torch.optim.Muon(
                matrices.values(),
                lr=MUON_LR * self.lr,
                weight_decay=0.02,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(others, lr=ADAM_LR * self.lr, betas=(0.9, 0.98), weight_decay=0),
        ]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["full_lr"] = group["lr"]

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "rng": self.rng.getstate(),
            "counts": (self.step, self.tokens, self.cpu_seconds),
        }
        with whole_file(path) as file:
            torch.save(state, file)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rng.setstate(state["rng"])
        self.step, self.tokens, self.cpu_seconds = state["counts"]


def _is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    return "blocks." in name and parameter.ndim == 2


def learning_rate(step: int, progress: float) -> float:
    """Share of the full learning rate: a short warm-up, a plateau, a linear fall."""
    fall = min(1.0, (1 - progress) / (1 - DECAY_FROM))
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(fall, 0.02)


def train_step(training: Training, batch: Batch, progress: float) -> float:
    """One optimiser step on the velocity `noise - latents`; returns the loss."""
    for block in training.model.blocks:
        block.attn2.processor.bias = batch.text_bias
    with torch.autocast("cpu", torch.bfloat16):
        velocity = training.model(batch.noisy, batch.sigma * 1000, batch.text, return_dict=False)[0]
    loss = (velocity.float() - (batch.noise - batch.latents)).square().mean()
    loss.backward()
    share = learning_rate(training.step, progress)
    nn.utils.clip_grad_norm_(training.optimizers[1].param_groups[0]["params"], 1.0)
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * share
        optimizer.step()
        optimizer.zero_grad()
    training.step += 1
    training.tokens += batch.latents[:, 0, ::2].numel()
    keep = min(EMA, training.step / (training.step + 9))
    averaged, current = list(training.ema.parameters()), list(training.model.parameters())
    torch._foreach_lerp_(averaged, [p.detach() for p in current], 1 - keep)
    return loss.item()


def finished(training: Training, pipe: WanPipeline) -> WanPipeline:
    """The pipeline with a copy of the averaged weights."""
    transformer = copy.deepcopy(training.ema)
    for block in transformer.blocks:
        block.attn2.set_processor(WanAttnProcessor())
    parts = {**pipe.components, "transformer": transformer}
    return WanPipeline(**{k: copy.deepcopy(v) for k, v in parts.items() if v is not None})


def run(pipe: WanPipeline, out: Path, args: argparse.Namespace) -> None:
    """Train until the budget is spent, and write the folder `out` now and then and at the end."""
    pipe.transformer.train()
    for block in pipe.transformer.blocks:
        block.attn2.set_processor(PaddedTextAttention())
    training = Training(pipe.transformer, args.lr, Random(args.seed))
    checkpoint = out.with_name(out.name + ".checkpoint")
    if checkpoint.exists():
        training.load(checkpoint)
        print(f"goes on from {checkpoint}, step {training.step}", flush=True)
    encode_video = PatchEncoder(pipe.vae)
    encode_text = partial(encode, pipe.tokenizer, pipe.text_encoder)
    start = time.process_time() - training.cpu_seconds
    saved, losses = training.cpu_seconds, deque(maxlen=100)
    try:
        while (progress := _progress(training, args)) < 1:
            mix = args.mix_from + (1 - args.mix_from) * progress
            bucket = choose_bucket(mix, training.rng)
            batch = make_batch(bucket, encode_video, encode_text, training.rng, args.noise_shift)
            losses.append(train_step(training, batch, progress))
            training.cpu_seconds = time.process_time() - start
            if training.step % args.log_every == 0:
                _report(training, progress, losses)
            if training.cpu_seconds - saved > args.save_every:
                saved = training.cpu_seconds
                training.save(checkpoint)
                write_pipeline(finished(training, pipe), out)
    except KeyboardInterrupt:
        training.save(checkpoint)
        raise SystemExit(f"\nstopped; the same command goes on from {checkpoint}") from None
    write_pipeline(finished(training, pipe), out)
    checkpoint.unlink(missing_ok=True)
    _report(training, 1.0, losses)
    print(f"wrote {out}")


def _progress(training: Training, args: argparse.Namespace) -> float:
    if args.steps is not None:
        return training.step / args.steps
    return training.cpu_seconds / args.cpu_seconds


def _report(training: Training, progress: float, losses: deque[float]) -> None:
    print(
        f"{progress:4.0%}  step {training.step}  loss {sum(losses) / max(len(losses), 1):.4f}  "
        f"{training.tokens / 1e6:.2f} Mtok  {training.cpu_seconds:.0f} CPU-s",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--cpu-seconds", type=float, help="budget in CPU seconds")
    budget.add_argument("--steps", type=int, help="budget in steps")
    parser.add_argument("--init", help="pipeline folder to go on from, instead of nothing")
    parser.add_argument("--lr", type=float, default=1.0, help="factor on the learning rates")
    parser.add_argument(
        "--mix-from", type=float, default=0.0, help="start with a later mix of sizes, 0..1"
    )
    parser.add_argument(
        "--noise-shift", type=float, default=NOISE_SHIFT, help="larger trains on more noise"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=50, help="steps between reports")
    parser.add_argument("--save-every", type=float, default=300, help="CPU seconds between saves")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()  # the weights are meant to be cast to bfloat16
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    if args.init:
        pipe = WanPipeline.from_pretrained(args.init).to(torch.float32)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    else:
        pipe = new_pipeline(args.seed)
    run(pipe, args.out, args)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    main()
