"""Train the embedded video VLM from nothing on one CPU, and write it as a folder of transformers.

    python -m demos.tiny_vlm.train --out my_model --cpu-seconds 3000

Clips are drawn on the fly. Behind each one stand all questions with their answers, in random order, and
then a list of what every picture shows: with the answers alone, a prototype was still at chance after six
minutes. Clips grow, in pictures and in tokens a picture, as soon as the questions are answered.

The budget and the learning rate follow the process's CPU time, so that a busy machine changes neither.
Ctrl-C keeps a checkpoint beside the output; the same command goes on from it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from transformers.utils import logging

from demos.tiny_vlm.clips import Clips, draw_clips
from demos.tiny_vlm.folder import new_model, write_model
from demos.tiny_vlm.inputs import video_inputs
from demos.tiny_vlm.questions import LISTS, QUESTIONS, tokens
from sparse_dit.whole_file import whole_file

# pictures, tokens on a side of each, clips a step
LEVELS = (
    (1, 2, 48),
    (2, 2, 32),
    (4, 2, 32),
    (8, 2, 32),
    (4, 4, 16),
    (16, 2, 16),
    (2, 8, 8),
    (16, 4, 8),
    (32, 2, 8),
    (8, 8, 4),
    (64, 2, 6),
    (32, 4, 4),
    (16, 8, 2),
    (128, 2, 3),
    (64, 4, 2),
    (32, 8, 1),
    (64, 8, 1),
    (128, 8, 1),  # 8,192 video tokens
)
GATE = ("colour", "motion")  # questions that decide when clips grow; shapes are learned on the way
ENOUGH, LONGEST_STAY = 0.9, 0.1  # share answered right; share of the budget on one level
NEWEST = 0.3  # share of the steps on clips of the newest level
MUON_LR, ADAM_LR, WARMUP_STEPS, DECAY_FROM = 4e-3, 2e-3, 50, 0.65


@dataclass
class Training:
    """All that changes while training, and all that a checkpoint holds."""

    model: nn.Module
    generator: Generator
    step: int = 0
    cpu_seconds: float = 0.0
    level: int = 0
    since: float = 0.0  # CPU seconds when the level began
    right: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in QUESTIONS})
    optimizers: list[torch.optim.Optimizer] = field(init=False)

    def __post_init__(self) -> None:
        matrices = [p for n, p in self.model.named_parameters() if _is_block_matrix(n, p)]
        chosen = set(map(id, matrices))
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        self.optimizers = [
            torch.optim.Muon(
                matrices, lr=MUON_LR, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["full_lr"] = group["lr"]

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "generator": self.generator.get_state(),
            "counts": (self.step, self.cpu_seconds, self.level, self.since),
            "right": self.right,
        }
        with whole_file(path) as partial:
            torch.save(state, partial)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.step, self.cpu_seconds, self.level, self.since = state["counts"]
        self.right = state["right"]


def _is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    return (".layers." in name or ".blocks." in name) and parameter.ndim == 2


def learning_rate(step: int, progress: float) -> float:
    """Share of the full learning rate: a short warm-up, a plateau, a linear fall."""
    fall = min(1.0, (1 - progress) / (1 - DECAY_FROM))
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(fall, 0.02)


def lesson(clips: Clips, order: list[str], listed: str) -> tuple[Tensor, Tensor]:
    """The text behind each clip, `[B, L]`, and where in it an answer stands, `[L]`.

    It is the questions in the given order with their answers, then a list.
    """
    batch, parts, answers = len(clips.colour), [], []
    for kind in order:
        known, right = QUESTIONS[kind]
        asked = tokens((kind, "?")).expand(batch, -1)
        parts.append(torch.cat([asked, tokens(known)[right(clips)][:, None]], 1))
        answers += [False, False, True]
    known, right = LISTS[listed]
    parts += [tokens((listed, ":")).expand(batch, -1), tokens(known)[right(clips)]]
    answers += [False, False] + [True] * clips.colour.shape[1]
    return torch.cat(parts, 1), torch.tensor(answers)


def train_step(training: Training, progress: float) -> float:
    """One optimiser step on clips of the newest level or of any so far; returns the loss."""
    generator = training.generator
    level = training.level
    if torch.rand((), generator=generator) > NEWEST:
        level = int(torch.randint(training.level + 1, (), generator=generator))
    pictures, side, batch = LEVELS[level]
    clips = draw_clips(batch, pictures, side, generator)
    kinds, lists = list(QUESTIONS), list(LISTS)
    order = [kinds[i] for i in torch.randperm(len(kinds), generator=generator)]
    listed = lists[int(torch.randint(len(lists), (), generator=generator))]
    text, answers = lesson(clips, order, listed)
    logits = training.model(
        **video_inputs(clips.pixels, text[:, :-1]), use_cache=False, logits_to_keep=text.shape[1]
    ).logits[:, answers]  # the last position of the video predicts the first word of the text
    truth = text[:, answers]
    loss_of = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="none")
    loss_of = loss_of.view(truth.shape)
    loss = loss_of[:, : len(order)].mean() + 0.5 * loss_of[:, len(order) :].mean()
    _update(training, loss, progress)
    if level == training.level:
        right = (logits.argmax(-1) == truth).float().mean(0).tolist()
        for kind, share in zip(order, right, strict=False):
            training.right[kind] = (training.right[kind] + [share])[-_window(batch) :]
    return loss.item()


def _window(batch: int) -> int:
    """Steps whose answers decide: at least ten, and at least 32 clips."""
    return max(10, 32 // batch)


def _update(training: Training, loss: Tensor, progress: float) -> None:
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
    window = _window(LEVELS[training.level][2])
    full = all(len(training.right[kind]) >= window for kind in GATE)
    learned = full and all(_mean(training.right[kind]) >= ENOUGH for kind in GATE)
    late = training.cpu_seconds - training.since > LONGEST_STAY * budget
    if training.level + 1 < len(LEVELS) and (learned or late):
        _report(training, "learned" if learned else "left")
        training.level += 1
        training.since = training.cpu_seconds
        training.right = {kind: [] for kind in QUESTIONS}


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
            train_step(training, progress)
            training.cpu_seconds = time.process_time() - start
            climb(training, args.cpu_seconds)
            if training.step % args.log_every == 0:
                _report(training, f"{progress:.0%}")
            if training.cpu_seconds - saved > args.save_every:
                saved = training.cpu_seconds
                training.save(checkpoint)
                write_model(training.model, out)
    except KeyboardInterrupt:
        training.save(checkpoint)
        raise SystemExit(f"\nstopped; the same command goes on from {checkpoint}") from None
    write_model(training.model, out)
    checkpoint.unlink(missing_ok=True)
    _report(training, "100%")
    print(f"wrote {out}")


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


def _report(training: Training, word: str) -> None:
    pictures, side, _ = LEVELS[training.level]
    shares = "  ".join(f"{kind} {_mean(v):.2f}" for kind, v in training.right.items())
    print(
        f"{word:7} step {training.step}  {pictures} x {side}x{side}  {shares}  "
        f"{training.cpu_seconds:.0f} CPU-s",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--cpu-seconds", type=float, required=True, help="budget in CPU seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=50, help="steps between reports")
    parser.add_argument("--save-every", type=float, default=120, help="CPU seconds between saves")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    model = new_model(args.seed).train()
    run(Training(model, Generator().manual_seed(args.seed)), args.out, args)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    main()
