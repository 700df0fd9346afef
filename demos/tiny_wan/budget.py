"""A training within a budget of CPU seconds: reports, checkpoints, and what is stopped and gone on with."""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

RECENT = 100  # steps whose mean loss is reported


class Training(Protocol):
    """All that changes while training, and all that a checkpoint holds."""

    step: int
    cpu_seconds: float

    def train_step(self, progress: float) -> float: ...
    def save(self, path: Path) -> None: ...
    def load(self, path: Path) -> None: ...


def add_budget(parser: argparse.ArgumentParser, log_every: int) -> None:
    """Add the options that `train` reads."""
    parser.add_argument("--cpu-seconds", type=float, required=True, help="budget in CPU seconds")
    parser.add_argument("--log-every", type=int, default=log_every, help="steps between reports")
    parser.add_argument("--save-every", type=float, default=120, help="CPU seconds between saves")


def resumed(training: Training, checkpoint: Path) -> bool:
    """Whether there is a checkpoint, from which the training then goes on."""
    if not checkpoint.exists():
        return False
    training.load(checkpoint)
    print(f"goes on from {checkpoint}, step {training.step}", flush=True)
    return True


def train(
    training: Training, args: argparse.Namespace, checkpoint: Path, write: Callable[[], None]
) -> None:
    """Train until the budget is spent; Ctrl-C keeps a checkpoint.

    Args:
        training: What is trained.
        args: With the options of `add_budget`, and `out`.
        checkpoint: File that is there until all is done.
        write: Writes what was trained, now and then and at the end.
    """
    start, saved = time.process_time() - training.cpu_seconds, training.cpu_seconds
    losses: deque[float] = deque(maxlen=RECENT)
    try:
        while (progress := training.cpu_seconds / args.cpu_seconds) < 1:
            losses.append(training.train_step(progress))
            training.cpu_seconds = time.process_time() - start
            if training.step % args.log_every == 0:
                mean = sum(losses) / len(losses)
                print(f"{progress:4.0%}  step {training.step}  loss {mean:.4f}", flush=True)
            if training.cpu_seconds - saved > args.save_every:
                saved = training.cpu_seconds
                training.save(checkpoint)
                write()
    except KeyboardInterrupt:
        training.save(checkpoint)
        raise SystemExit(f"\nstopped; the same command goes on from {checkpoint}") from None
    write()
    checkpoint.unlink(missing_ok=True)
    print(f"wrote {args.out}")
