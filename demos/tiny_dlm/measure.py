"""Ask the embedded diffusion language model for pass keys in long texts: stock and under plans, in turn.

    python -m demos.tiny_dlm.measure demos/tiny_dlm/model --sizes 512:16 2048:8 --ways exact

A way is what `sparse_dit.patch` takes: `exact`, a rule's name or a plan's file. Problems follow from their
number alone, so two runs ask the same. Printed is which share was answered right: the one pass key of a text,
all five digits; one of three people's pass keys in a text; a fact, word for word. On texts half of whose last
128 tokens are masked follow the loss and the divergence from stock, KL(stock || way), in nats a masked token.
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.pipelines.llada2.pipeline_llada2 import LLaDA2Pipeline
from diffusers.schedulers.scheduling_block_refinement import BlockRefinementScheduler
from torch import Tensor
from transformers.utils import logging

import sparse_dit
from demos.tiny_dlm.folder import load_pipeline
from demos.tiny_dlm.problems import CANVAS, KINDS, Problem, draw_problem, draw_text

FIRST_SEED = 1_000_000  # of the measured texts; training draws all of its own from one seed
STEPS = 8  # of one answer, unless told


@dataclass(frozen=True)
class Size:
    """Tokens of a prompt with its canvas, and how many problems."""

    tokens: int
    problems: int


@dataclass
class Score:
    """Sums over the problems of one size, for one way."""

    right: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    loss: float = 0.0
    divergence: float = 0.0
    cpu_seconds: float = 0.0


def parse_size(text: str) -> Size:
    """A size such as `2048:8`: tokens, number of problems."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected TOKENS:PROBLEMS, got {text!r}")
    return Size(*map(int, match.groups()))


def answer(pipe: Any, problem: Problem, steps: int = STEPS) -> str:
    """What the pipeline writes behind a problem's prompt, up to the end token."""
    return (
        pipe(
            input_ids=torch.tensor([problem.tokens]),
            gen_length=CANVAS,
            block_length=CANVAS,
            num_inference_steps=steps,
            editing_threshold=None,
        )
        .texts[0]
        .strip()
    )


def is_right(said: str, problem: Problem) -> bool:
    """Whether a pass key has all its digits, or a fact all its words."""
    digits = problem.answer[:5]
    return said[:5] == digits if digits.isdecimal() else said == problem.answer


def masked_text(pipe: Any, tokens: int, random: Random) -> tuple[Tensor, Tensor]:
    """A text, `[1, tokens]`, and the same with half of its last 128 tokens masked."""
    text = torch.tensor([draw_text(tokens, random)])
    last = range(tokens - min(128, tokens), tokens)
    seen = text.clone()
    seen[0, random.sample(last, len(last) // 2)] = pipe.tokenizer.mask_token_id
    return text, seen


@torch.no_grad()
def log_probs_of(pipe: Any, seen: Tensor) -> Tensor:
    """Log-probabilities at the masked tokens, `[masked, vocabulary]`."""
    logits = pipe.model(seen, attention_mask=torch.ones_like(seen)).logits
    return logits[seen == pipe.tokenizer.mask_token_id].log_softmax(-1)


@torch.no_grad()
def infill(pipe: Any, seen: Tensor, steps: int = 16) -> Tensor:
    """The text `[1, N]` with its masked tokens filled in, in that many steps at most."""
    mask = pipe.tokenizer.mask_token_id
    scheduler: Any = BlockRefinementScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps, block_length=int((seen == mask).sum()))
    for step in range(steps):
        if not (seen == mask).any():
            break
        logits = pipe.model(seen, attention_mask=torch.ones_like(seen)).logits
        seen = scheduler.step(logits, step, seen, mask_token_id=mask).prev_sample
    return seen


def ask_all(pipes: dict[str, Any], size: Size, steps: int = STEPS) -> dict[str, Score]:
    """Every problem of a size, by all pipelines in turn; the first is what divergence is measured from."""
    scores = {way: Score() for way in pipes}
    for number in range(size.problems):
        random = Random(FIRST_SEED + number)
        depth = (number + 0.5) / size.problems
        problems = {kind: draw_problem(size.tokens, kind, depth, random) for kind in KINDS}
        text, seen = masked_text(next(iter(pipes.values())), size.tokens, random)
        truth = text[seen != text]
        stock = None
        for way, pipe in pipes.items():
            score = scores[way]
            start = time.process_time()
            for kind, problem in problems.items():
                score.right[kind] += is_right(answer(pipe, problem, steps), problem)
            score.cpu_seconds += (time.process_time() - start) / len(KINDS)
            log_probs = log_probs_of(pipe, seen)
            stock = log_probs if stock is None else stock
            score.loss += F.nll_loss(log_probs, truth).item()
            score.divergence += F.kl_div(
                log_probs, stock, reduction="batchmean", log_target=True
            ).item()
    return scores


def measure(pipe: Any, sizes: list[Size], ways: list[str], steps: int = STEPS) -> None:
    """Print one table: a row for each size and way."""
    print(
        "| tokens | problems | way | density | pass key | named | fact | loss | KL | CPU s an answer |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for size in sizes:
        with ExitStack() as stack:
            pipes = {"stock": pipe} | {way: _copy(pipe) for way in ways}
            handles = {way: stack.enter_context(sparse_dit.patch(pipes[way], way)) for way in ways}
            scores = ask_all(pipes, size, steps)
        for way, score in scores.items():
            density = handles[way].summary().density if way in handles else 1.0
            n = size.problems
            shares = " | ".join(f"{score.right[kind] / n:.2f}" for kind in KINDS)
            print(
                f"| {size.tokens:,} | {n} | {way} | {density:.3f} | {shares} | {score.loss / n:.3f} | "
                f"{score.divergence / n:.4f} | {score.cpu_seconds / n:.2f} |",
                flush=True,
            )


def _copy(pipe: Any) -> Any:
    twin = LLaDA2Pipeline(copy.deepcopy(pipe.model), pipe.scheduler, pipe.tokenizer)
    twin.set_progress_bar_config(disable=True)
    return twin


def show(pipe: Any, random: Random) -> None:
    """Print a text with masks, what the model fills in, and what was there."""
    text, seen = masked_text(pipe, 128, random)
    shown = {"masked": seen, "filled": infill(pipe, seen), "true": text}
    for word, tokens in shown.items():
        said = pipe.tokenizer.decode(tokens[0]).replace(pipe.tokenizer.mask_token, " _")
        print(f"{word}: {said.strip()}\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="pipeline folder to measure")
    parser.add_argument(
        "--sizes",
        type=parse_size,
        nargs="*",
        default=[parse_size("512:16"), parse_size("2048:8")],
        help="problems to ask, as TOKENS:PROBLEMS",
    )
    parser.add_argument("--ways", nargs="*", default=["exact"], help="beside stock")
    parser.add_argument("--steps", type=int, default=STEPS, help="of one answer, at most 16")
    parser.add_argument("--show", type=int, default=0, help="texts to fill in and print")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    pipe = load_pipeline(args.folder)
    for number in range(args.show):
        show(pipe, Random(FIRST_SEED + number))
    if args.sizes:
        measure(pipe, args.sizes, args.ways, args.steps)


if __name__ == "__main__":
    main()
