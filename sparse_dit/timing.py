"""How long work takes, so that other programs on the machine don't falsify it.

On a CPU it is CPU time, which stands still while another program has the processor; on a GPU the clock,
after the device has finished. Dense and sparse are compared in pairs of one case each.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

LEAST_SHARE = 0.8  # of the time on the clock that a CPU must have worked on what is timed
MOST_SPREAD = 0.1  # between the pairs of a comparison
QUEUED = 4  # calls of a GPU that are timed together


@dataclass(frozen=True)
class Taken:
    """How long something took.

    Args:
        seconds: On a CPU the CPU time of the thread that called, or the CPU time of the process divided by
            torch's threads if that is more: the thread takes part in all that is computed and waits for the
            others, so on a quiet machine this is what the clock says. On other devices, and on Windows,
            which counts CPU time in steps of 16 ms, it is the time on the clock.
        wall: The seconds that passed on the clock.
    """

    seconds: float
    wall: float

    @property
    def share(self) -> float:
        """`seconds / wall`, at most 1; little if others had the processor meanwhile."""
        return min(1.0, self.seconds / self.wall) if self.wall > 0 else 1.0


class Timer:
    """A timer that runs from when it is made.

    Args:
        device: The device whose work is timed; a GPU is waited for before and after.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        synchronize(device)
        self._started = _clocks()

    def stop(self) -> Taken:
        """The time since the start. The timer runs on and may be asked again."""
        synchronize(self._device)
        wall, thread, process = (
            now - then for now, then in zip(_clocks(), self._started, strict=True)
        )
        if self._device.type != "cpu" or sys.platform == "win32":
            return Taken(wall, wall)
        return Taken(max(thread, process / torch.get_num_threads()), wall)


class Stopwatch:
    """Adds up the seconds of calls without making a GPU wait: by events in its queue, read at the end.

    Args:
        seconds: What is counted already.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self._events: list[tuple[torch.Event, torch.Event]] = []

    def run(self, work: Callable[[], Result], device: torch.device) -> Result:
        """What `work` returns, which the device computes."""
        if device.type == "cpu":
            timer = Timer(device)
            result = work()
            self._seconds += timer.stop().seconds
            return result
        start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        start.record()
        result = work()
        end.record()
        self._events.append((start, end))
        return result

    @property
    def seconds(self) -> float:
        """The seconds that all calls took together; waits until the last one is done."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1e3
        self._events.clear()
        return self._seconds


@dataclass(frozen=True)
class Pairs:
    """How long the same cases took, dense and sparse.

    Args:
        dense, sparse: The times of the cases, in the same order; at least one of each.
    """

    dense: Sequence[Taken]
    sparse: Sequence[Taken]

    @property
    def speedup(self) -> float:
        """The seconds of all dense cases together, over those of all sparse ones."""
        dense, sparse = (sum(taken.seconds for taken in side) for side in (self.dense, self.sparse))
        return dense / max(sparse, 1e-9)

    @property
    def speedups(self) -> list[float]:
        """The dense over the sparse seconds of each pair, in order."""
        pairs = zip(self.dense, self.sparse, strict=True)
        return [dense.seconds / max(sparse.seconds, 1e-9) for dense, sparse in pairs]

    @property
    def spread(self) -> float | None:
        """Distance between the greatest and the least pair over their median; None for a single pair."""
        found = self.speedups
        return (max(found) - min(found)) / statistics.median(found) if len(found) > 1 else None

    @property
    def caution(self) -> str | None:
        """Why the speed-up says little, if it does."""
        share = min(taken.share for taken in (*self.dense, *self.sparse))
        if share < LEAST_SHARE:
            return (
                f"the machine was too busy for the speed-up to mean much: it worked on a generation for "
                f"{share:.0%} of its time; measure again when it is quiet"
            )
        if self.spread is not None and self.spread > MOST_SPREAD:
            return (
                f"the speed-up is of little use: pairs of one prompt each differ by {self.spread:.0%}; "
                "measure again when the machine is quiet"
            )
        return None


def timing_of(pairs: Pairs | None) -> dict[str, Any]:
    """What a plan's `measured` says of its speed-up, beside the number.

    Args:
        pairs: That it is of; None if nothing ran sparse, so that there was nothing to measure.
    """
    if pairs is None:
        return {"timing": "dense; not measured"}
    found = pairs.speedups
    of_pairs = {"speedup_least": round(min(found), 4), "speedup_most": round(max(found), 4)}
    caution = {"caution": pairs.caution} if pairs.caution else {}
    return {**(of_pairs if len(found) > 1 else {}), "timed_pairs": len(found), **caution}


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on a GPU by its own clock, the mean of several that follow each other.

    One more goes before them. While that is computed they are launched, so that launching isn't counted
    unless it takes longer than computing.
    """
    watch = Stopwatch()
    if device.type == "cpu":
        watch.run(run, device)
        return watch.seconds
    run()
    watch.run(lambda: [run() for _ in range(QUEUED)], device)
    return watch.seconds / QUEUED


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _clocks() -> tuple[float, float, float]:
    return time.perf_counter(), time.thread_time(), time.process_time()
