"""Ask the embedded VLM about drawn clips: stock, exact, and under plans, in turn for every question.

    python -m demos.tiny_vlm.measure demos/tiny_vlm/model --sizes 64x8:24 --ways exact plan.json

A way is `exact`, a plan's file, or one estimated shape for all heads with its budget as a share of the
keys: `vertical_slash:0.1`, `pooled_blocks:0.1`, `sink_window:0.1`. Clips follow from their number alone,
so two runs ask the same. Each question is a prompt of its own, the clip's tokens first.
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Generator, Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import logging

import sparse_dit
from demos.tiny_vlm.clips import Clips, draw_clips
from demos.tiny_vlm.inputs import video_inputs
from demos.tiny_vlm.questions import QUESTIONS, tokens
from sparse_dit.integrations import heads_of
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Budget, Pattern, PooledBlocks, SinkWindow, VerticalSlash
from sparse_dit.plan import ComponentPlan, HeadChoice, Plan, Stage, config_hash

SHAPES = {
    "vertical_slash": VerticalSlash,
    "pooled_blocks": PooledBlocks,
    "sink_window": SinkWindow,
}
FIRST_SEED = 1_000_000  # of the measured clips; training draws all of its own from one seed


@dataclass(frozen=True)
class Size:
    """Pictures, tokens on a side of each, and how many clips."""

    pictures: int
    side: int
    clips: int

    @property
    def video_tokens(self) -> int:
        return self.pictures * self.side**2

    def __str__(self) -> str:
        return f"{self.pictures} x {self.side} x {self.side}"


@dataclass
class Answers:
    """What one way answered: for each question whether right, and the log-probability of the right word."""

    right: dict[str, list[bool]] = field(default_factory=lambda: {kind: [] for kind in QUESTIONS})
    log_prob: dict[str, list[float]] = field(
        default_factory=lambda: {kind: [] for kind in QUESTIONS}
    )
    cpu_seconds: float = 0.0

    def accuracy(self, kind: str) -> float:
        return sum(self.right[kind]) / len(self.right[kind])

    def mean_log_prob(self, kind: str) -> float:
        return sum(self.log_prob[kind]) / len(self.log_prob[kind])


def parse_size(text: str) -> Size:
    """A size such as `64x8:24`: pictures, tokens on a side, number of clips."""
    match = re.fullmatch(r"(\d+)x(\d+):(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected PICTURESxSIDE:CLIPS, got {text!r}")
    return Size(*map(int, match.groups()))


def load(folder: str | Path) -> PreTrainedModel:
    """The model of a folder, in float32."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def clips_of(size: Size) -> Iterator[Clips]:
    """One clip after another, always the same ones."""
    for number in range(size.clips):
        generator = Generator().manual_seed(FIRST_SEED + number)
        yield draw_clips(1, size.pictures, size.side, generator)


def chance(kind: str, pictures: int) -> float:
    """Share of right answers of who always gives the most frequent one."""
    if kind == "number":
        return 1 / pictures
    count = len(QUESTIONS[kind][0])
    return max(1 / pictures, (1 - 1 / pictures) / (count - 1)) if kind == "next" else 1 / count


@torch.no_grad()
def ask(model: PreTrainedModel, clips: Clips, kind: str) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all words as the answer, `[B, vocabulary]`, and the right one's number, `[B]`."""
    known, right = QUESTIONS[kind]
    text = tokens((kind, "?")).expand(len(clips.framed), -1)
    inputs = video_inputs(clips.pixels, text)
    logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits.log_softmax(-1), tokens(known)[right(clips)]


def ask_all(models: dict[str, PreTrainedModel], size: Size) -> dict[str, Answers]:
    """Every question about every clip, by all models in turn."""
    found = {way: Answers() for way in models}
    for clips in clips_of(size):
        for kind in QUESTIONS:
            for way, model in models.items():
                start = time.process_time()
                log_probs, right = ask(model, clips, kind)
                found[way].cpu_seconds += time.process_time() - start
                found[way].right[kind].append(bool(log_probs.argmax(-1) == right))
                found[way].log_prob[kind].append(log_probs[0, right].item())
    return found


def uniform_plan(model: PreTrainedModel, pattern: Pattern) -> Plan:
    """A plan with the same estimated pattern for every head, in prefill."""
    heads = heads_of(model)
    part = ComponentPlan(
        model_class=type(model).__name__,
        config_hash=config_hash(model.config),
        heads=heads,
        layout=TokenLayout.sequence(8192),
        stages=(Stage(1.0, 0.0, phase="prefill"),),
        layers={layer: ((HeadChoice(pattern),) * count,) for layer, (count, _) in heads.items()},
        kind="language_model",
    )
    return Plan("", {"model": part}, pattern.shape.budget.density(8192))


def plan_of(way: str, model: PreTrainedModel) -> str | Plan:
    """What `sparse_dit.patch` is given for a way."""
    name, _, share = way.partition(":")
    if name not in SHAPES:
        return way
    return uniform_plan(model, Pattern(SHAPES[name](budget=Budget(beta=float(share)))))


def measure(model: PreTrainedModel, sizes: list[Size], ways: list[str]) -> None:
    """Print one table: a row for each size and way."""
    kinds = " | ".join(QUESTIONS)
    print(f"| pictures x tokens | clips | way | density | CPU s | x stock | {kinds} |")
    print("|---" * (6 + len(QUESTIONS)) + "|", flush=True)
    for size in sizes:
        place = f"{size} = {size.video_tokens:,} | {size.clips}"
        odds = " | ".join(f"{chance(kind, size.pictures):.2f}" for kind in QUESTIONS)
        print(f"| {place} | chance | | | | {odds} |")
        with ExitStack() as stack:
            models = {"stock": model} | {way: copy.deepcopy(model) for way in ways}
            handles = {
                way: stack.enter_context(sparse_dit.patch(models[way], plan_of(way, model)))
                for way in ways
            }
            found = ask_all(models, size)
        for way, answers in found.items():
            density = handles[way].summary().density if way in handles else 1.0
            seconds = answers.cpu_seconds / (size.clips * len(QUESTIONS))
            ratio = found["stock"].cpu_seconds / answers.cpu_seconds
            scores = " | ".join(
                f"{answers.accuracy(kind):.2f} ({answers.mean_log_prob(kind):.2f})"
                for kind in QUESTIONS
            )
            print(
                f"| {place} | {way} | {density:.3f} | {seconds:.3f} | {ratio:.2f} | {scores} |",
                flush=True,
            )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="model folder to measure")
    parser.add_argument(
        "--sizes",
        type=parse_size,
        nargs="+",
        default=[parse_size("8x2:64"), parse_size("32x4:32")],
        help="clips to ask about, as PICTURESxSIDE:CLIPS",
    )
    parser.add_argument("--ways", nargs="*", default=["exact"], help="beside stock")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    model = load(args.folder)
    for way in args.ways:
        plan_of(way, model)
    measure(model, args.sizes, args.ways)


if __name__ == "__main__":
    main()
