r"""Distil the embedded model to a few steps without guidance, as a LoRA.

    python -m demos.tiny_wan.few_steps demos/tiny_wan/model --steps 8 --out lora.safetensors \
        --cpu-seconds 2000

The student takes one step where the guided teacher takes several: its velocity at a noise level is taught to
be the mean of the teacher's until the next one (progressive distillation, arXiv 2202.00512, with the guidance
inside, arXiv 2210.03142). Half of the states are noised clips, half are the student's own on its way from
noise, as it will meet them. Both use the pipeline's own scheduler. Ctrl-C keeps a checkpoint beside the
output; the same command goes on from it.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random

import torch
from diffusers import WanPipeline
from diffusers.utils import logging
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from demos.tiny_wan.batches import Bucket
from demos.tiny_wan.budget import add_budget, resumed, train
from demos.tiny_wan.measure import TEXT_LEN
from demos.tiny_wan.text import encode
from demos.tiny_wan.vae import PatchEncoder
from sparse_dit.eval.draw import draw, sample_prompt
from sparse_dit.whole_file import whole_file

RANK = 16
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
LEARNING_RATE = 2e-3
WARMUP_STEPS = 20
EMA = 0.99
GUIDANCE = 3.0
BUCKETS = (
    Bucket(16, 8, 8, 1, (3, 1)),  # 512
    Bucket(8, 12, 12, 1, (3, 1)),  # 576
    Bucket(4, 16, 16, 1, (3, 1)),  # 512
    Bucket(8, 16, 16, 1, (2, 2)),  # 1,024
    Bucket(4, 24, 24, 1, (1, 2)),  # 1,152
    Bucket(16, 16, 16, 1, (0, 1)),  # 2,048
    Bucket(4, 32, 32, 1, (0, 1)),  # 2,048
    Bucket(16, 24, 24, 1, (0, 0.2)),  # 4,608
)


@dataclass(frozen=True)
class Ladder:
    """Noise levels: `knots` of the student's steps, and `rungs` of the teacher's between two knots.

    `knots` has one entry more than steps, and ends at 0.
    """

    knots: tuple[float, ...]
    rungs: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, pipe: WanPipeline, steps: int, parts: int) -> Ladder:
        """The scheduler's levels; `parts` steps of the teacher for one of the student's."""
        pipe.scheduler.set_timesteps((steps - 1) * parts + 1)
        levels = pipe.scheduler.sigmas.tolist()
        last = levels[-2:]  # the scheduler's last step, to 0, is a tiny one: it isn't divided
        rungs = [tuple(levels[i : i + parts + 1]) for i in range(0, len(levels) - 2, parts)]
        return cls((*levels[:-1:parts], 0.0), (*rungs, tuple(last)))


class Distillation:
    """All that changes while training, and all that a checkpoint holds."""

    def __init__(self, pipe: WanPipeline, ladder: Ladder, seed: int, lr: float) -> None:
        torch.manual_seed(seed)
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS))
        pipe.transformer.requires_grad_(False)
        pipe.transformer.add_adapter(config)
        self.pipe, self.model, self.ladder = pipe, pipe.transformer, ladder
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.weights]
        self.optimizer = torch.optim.AdamW(self.weights, lr, betas=(0.9, 0.98), weight_decay=0)
        self.rng, self.step, self.cpu_seconds, self.lr = Random(seed), 0, 0.0, lr
        self.encode_video = PatchEncoder(pipe.vae)

    def text(self, prompts: list[str]) -> Tensor:
        return encode(self.pipe.tokenizer, self.pipe.text_encoder, prompts, TEXT_LEN)[0]

    def velocity(self, x: Tensor, level: float, text: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            timestep = torch.full((len(x),), 1000 * level)
            return self.model(x, timestep, text, return_dict=False)[0].float()

    @torch.no_grad()
    def state(self, bucket: Bucket, knot: int) -> tuple[Tensor, list[str]]:
        """Noisy latents at a knot: of drawn clips, or on the student's way there."""
        shape = (bucket.batch, 16, bucket.frames, bucket.height, bucket.width)
        generator = torch.Generator().manual_seed(self.rng.getrandbits(48))
        noise = torch.randn(shape, generator=generator)
        if self.rng.random() < 0.5:
            size = bucket.frames, bucket.height * 8, bucket.width * 8
            pairs = [draw(*size, self.rng) for _ in range(bucket.batch)]
            clips, prompts = zip(*pairs, strict=True)
            latents = self.encode_video(torch.stack(clips))
            return torch.lerp(latents, noise, self.ladder.knots[knot]), list(prompts)
        prompts = [sample_prompt(self.rng) for _ in range(bucket.batch)]
        text, knots = self.text(prompts), self.ladder.knots
        for here, there in pairwise(knots[: knot + 1]):
            noise = noise + (there - here) * self.velocity(noise, here, text)
        return noise, prompts

    @torch.no_grad()
    def taught(self, x: Tensor, knot: int, text: Tensor) -> Tensor:
        """The mean velocity of the guided teacher from a knot to the next."""
        rungs, y = self.ladder.rungs[knot], x
        both = torch.cat([text, self.text([""] * len(x))])
        self.model.disable_adapters()
        for here, there in pairwise(rungs):
            asked, free = self.velocity(torch.cat([y, y]), here, both).chunk(2)
            y = y + (there - here) * (free + GUIDANCE * (asked - free))
        self.model.enable_adapters()
        return (y - x) / (rungs[-1] - rungs[0])

    def train_step(self, progress: float) -> float:
        """One optimiser step; returns the loss."""
        weights = [(1 - progress) * b.weight[0] + progress * b.weight[1] for b in BUCKETS]
        bucket = self.rng.choices(BUCKETS, weights)[0]
        knot = self.rng.randrange(len(self.ladder.rungs) - 1)  # the last, tiny step decides nothing
        x, prompts = self.state(bucket, knot)
        text = self.text(prompts)
        goal = self.taught(x, knot, text)
        loss = (self.velocity(x, self.ladder.knots[knot], text) - goal).square().mean()
        loss.backward()
        share = min(1.0, (self.step + 1) / WARMUP_STEPS) * max(0.03, min(1.0, 2 * (1 - progress)))
        self.optimizer.param_groups[0]["lr"] = self.lr * share
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        keep = min(EMA, self.step / (self.step + 9))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.weights], 1 - keep)
        return loss.item()

    @torch.no_grad()
    def write(self, out: Path) -> None:
        """The averaged LoRA in bfloat16, as `load_lora_weights` reads it."""
        current = [p.detach().clone() for p in self.weights]
        for weight, averaged in zip(self.weights, self.average, strict=True):
            weight.copy_(averaged)
        layers = get_peft_model_state_dict(self.model)
        layers = {name: x.to(torch.bfloat16) for name, x in layers.items()}
        with whole_file(out) as file:
            WanPipeline.save_lora_weights(
                file.parent,
                transformer_lora_layers=layers,
                weight_name=file.name,
                safe_serialization=True,
            )
        for weight, kept in zip(self.weights, current, strict=True):
            weight.copy_(kept)

    def start_from(self, file: Path) -> None:
        """Go on from another LoRA of this rank, of more steps, say."""
        state = {n.removeprefix("transformer."): x.float() for n, x in load_file(file).items()}
        set_peft_model_state_dict(self.model, state)
        self.average = [p.detach().clone() for p in self.weights]

    def save(self, path: Path) -> None:
        state = {
            "weights": self.weights,
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.getstate(),
            "counts": (self.step, self.cpu_seconds),
        }
        with whole_file(path) as file:
            torch.save(state, file)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for weight, kept in zip(self.weights, state["weights"], strict=True):
            weight.copy_(kept)
        self.average = [p.detach() for p in state["average"]]
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.setstate(state["rng"])
        self.step, self.cpu_seconds = state["counts"]


def main(argv: list[str] | None = None) -> None:
    """Train until the budget is spent, and write the file now and then and at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="pipeline folder of the teacher")
    parser.add_argument("--steps", type=int, required=True, help="steps of the student")
    parser.add_argument("--parts", type=int, default=2, help="teacher's steps for one of them")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--init", type=Path, help="LoRA to start from, instead of none")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    add_budget(parser, log_every=25)
    args = parser.parse_args(argv)
    if args.out.suffix != ".safetensors":
        parser.error(f"--out: expected a name that ends in .safetensors, got {args.out}")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    pipe = WanPipeline.from_pretrained(args.folder).to(torch.float32)
    training = Distillation(pipe, Ladder.of(pipe, args.steps, args.parts), args.seed, args.lr)
    checkpoint = args.out.with_suffix(".checkpoint")
    if not resumed(training, checkpoint) and args.init is not None:
        training.start_from(args.init)
    train(training, args, checkpoint, partial(training.write, args.out))


if __name__ == "__main__":
    main()
