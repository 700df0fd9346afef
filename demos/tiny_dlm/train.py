"""Train the embedded diffusion language model from nothing on one CPU; write it as a LLaDA2Pipeline.

    python -m demos.tiny_dlm.train --out my_model --cpu-seconds 3600

Lessons are drawn on the fly. They grow, from 64 to 8,192 tokens, as soon as pass keys are found in them.

The budget and the learning rate follow the process's CPU time, so that a busy machine changes neither.
Ctrl-C keeps a checkpoint beside the output; the same command goes on from it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3ForCausalLM
from transformers.utils import logging

from demos.tiny_dlm.folder import new_model, write_pipeline
from demos.tiny_dlm.lessons import draw_lessons
from demos.tiny_dlm.muon import Muon
from sparse_dit.whole_file import whole_file

# tokens of a lesson, lessons a step
LEVELS = ((64, 48), (128, 24), (256, 14), (512, 8), (1024, 4), (2048, 2), (4096, 1), (8192, 1))
ENOUGH, LONGEST_STAY = 0.8, 0.06  # share of digits found; share of the budget on one level
NEWEST = 0.5  # share of the steps on the newest level
MUON_LR, ADAM_LR, WARMUP_STEPS, DECAY_FROM = 4e-3, 4e-3, 40, 0.6


@dataclass
class Training:
    """All that changes while training, and all that a checkpoint holds."""

    model: Qwen3ForCausalLM
    random: Random
    step: int = 0
    tokens: int = 0
    cpu_seconds: float = 0.0
    level: int = 0
    since: float = 0.0  # CPU seconds when the level began
    found: list[float] = field(default_factory=list)  # share of digits, at the newest level
    losses: list[float] = field(default_factory=list)
    optimizers: list[torch.optim.Optimizer] = field(init=False)

    def __post_init__(self) -> None:
        named = dict(self.model.named_parameters())
        matrices = {n: p for n, p in named.items() if ".layers." in n and p.ndim == 2}
        others = [p for n, p in named.items() if n not in matrices]
        self.optimizers = [
            Muon(matrices.values(), lr=MUON_LR),
            torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["full_lr"] = group["lr"]

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "random": self.random.getstate(),
            "counts": (self.step, self.tokens, self.cpu_seconds, self.level, self.since),
            "found": self.found,
        }
        with whole_file(path) as partial:
            torch.save(state, partial)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.random.setstate(state["random"])
        self.step, self.tokens, self.cpu_seconds, self.level, self.since = state["counts"]
        self.found = state["found"]


def learning_rate(step: int, progress: float) -> float:
    """Share of the full learning rate: a short warm-up, a plateau, a linear fall."""
    fall = min(1.0, (1 - progress) / (1 - DECAY_FROM))
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(fall, 0.02)


def train_step(training: Training, progress: float) -> float:
    """One optimiser step on lessons of the newest level or of one before it; returns the loss."""
    level = training.level
    if training.random.random() > NEWEST:
        level = training.random.randint(0, training.level)
    length, batch = LEVELS[level]
    lessons = draw_lessons(batch, length, training.random)
    hidden = training.model.model(
        lessons.seen,
        attention_mask=torch.ones_like(lessons.seen),
        position_ids=lessons.positions,
        use_cache=False,
    ).last_hidden_state
    asked = lessons.weight > 0
    logits = training.model.lm_head(hidden[asked])
    loss_of = F.cross_entropy(logits, lessons.truth[asked], reduction="none")
    loss = (loss_of * lessons.weight[asked]).sum() / batch
    _update(training, loss, progress)
    training.tokens += lessons.seen.numel()
    if level == training.level and (key := lessons.key[asked]).any():
        right = (logits.argmax(-1) == lessons.truth[asked])[key].float().mean().item()
        training.found = [*training.found, right][-_window(training.level) :]
    return loss.item()


def _window(level: int) -> int:
    """Steps with pass keys whose mean decides."""
    return 8 if LEVELS[level][1] > 1 else 4


def _update(training: Training, loss: torch.Tensor, progress: float) -> None:
    loss.backward()
    share = learning_rate(training.step, progress)
    nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * share
        optimizer.step()
        optimizer.zero_grad()
    training.step += 1


def climb(training: Training, budget: float) -> None:
    """Go to the next level if this one is learned, or has taken its time."""
    full = len(training.found) >= _window(training.level)
    learned = full and _mean(training.found) >= ENOUGH
    late = training.cpu_seconds - training.since > LONGEST_STAY * budget
    if training.level + 1 < len(LEVELS) and (learned or late):
        _report(training, "learned" if learned else "left")
        training.level += 1
        training.since = training.cpu_seconds
        training.found = []


def run(training: Training, out: Path, args: argparse.Namespace) -> None:
    """Train until the budget is spent, and write the folder `out` now and then and at the end."""
    checkpoint = out.with_name(out.name + ".checkpoint")
    if checkpoint.exists():
        training.load(checkpoint)
        print(f"goes on from {checkpoint}, step {training.step}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.process_time() - training.cpu_seconds
    saved = training.cpu_seconds
    try:
        while (progress := training.cpu_seconds / args.cpu_seconds) < 1:
            training.losses.append(train_step(training, progress))
            training.cpu_seconds = time.process_time() - start
            climb(training, args.cpu_seconds)
            if training.step % args.log_every == 0:
                _report(training, f"{progress:.0%}")
            if training.cpu_seconds - saved > args.save_every:
                saved = training.cpu_seconds
                training.save(checkpoint)
                write_pipeline(training.model, out)
    except KeyboardInterrupt:
        training.save(checkpoint)
        raise SystemExit(f"\nstopped; the same command goes on from {checkpoint}") from None
    write_pipeline(training.model, out)
    checkpoint.unlink(missing_ok=True)
    _report(training, "100%")
    print(f"wrote {out}")


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


def _report(training: Training, word: str) -> None:
    print(
        f"{word:7} step {training.step}  {LEVELS[training.level][0]} tokens  "
        f"loss {_mean(training.losses):.3f}  digits {_mean(training.found):.2f}  "
        f"{training.tokens:,} tokens  {training.cpu_seconds:.0f} CPU-s",
        flush=True,
    )
    training.losses.clear()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--cpu-seconds", type=float, required=True, help="budget in CPU seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=20, help="steps between reports")
    parser.add_argument("--save-every", type=float, default=240, help="CPU seconds between saves")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    model = new_model(args.seed).train()
    run(Training(model, Random(args.seed)), args.out, args)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    main()
