"""Measuring: calls in turn, so that what disturbs one disturbs all; medians; who else was busy."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from ..timing import timed

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MIN_ROUNDS = 3
TURN_SECONDS = 0.1  # short calls are repeated for this long before the next one's turn
TURN_CALLS = 10

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """How long a call takes.

    Args:
        seconds: Median of the samples.
        spread: Distance between their quartiles over the median.
        samples: How many times the call was timed.
    """

    seconds: float
    spread: float
    samples: int


@dataclass
class Load:
    """What others did with the machine while calls were timed.

    Args:
        busy: CPU seconds that all processes of the system used; None where that isn't known.
        own: CPU seconds of this process.
        wall: The seconds that passed on the clock.
        averages: The system's load averages before and after.
    """

    busy: float | None = 0.0
    own: float = 0.0
    wall: float = 0.0
    averages: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def foreign_cores(self) -> float | None:
        """Mean number of cores that other processes, or other guests of the host, used."""
        if self.busy is None or not self.wall:
            return None
        return max(0.0, (self.busy - self.own) / self.wall)

    def __add__(self, other: Load) -> Load:
        return Load(
            None if self.busy is None or other.busy is None else self.busy + other.busy,
            self.own + other.own,
            self.wall + other.wall,
            self.averages + other.averages,
        )


@contextlib.contextmanager
def watched() -> Iterator[Load]:
    """Load of what happens inside; filled in at its end."""
    load = Load()
    busy, own, wall = _busy(), time.process_time(), time.perf_counter()
    load.averages += _averages()
    yield load
    after = _busy()
    load.busy = None if busy is None or after is None else after - busy
    load.own = time.process_time() - own
    load.wall = time.perf_counter() - wall
    load.averages += _averages()


def interleaved(
    runs: Mapping[Key, Callable[[], object]],
    *,
    clock: str,
    rounds: int,
    budget: float | None = None,
    device: torch.device | None = None,
) -> dict[Key, Timing]:
    """Time calls in turn, round after round. Call each once before: nothing is thrown away here.

    Args:
        runs: The calls to time, by any key.
        clock: A name in `CLOCKS`. `"cpu"` adds up what all threads of this process use: set one.
        rounds: How many times each call is timed, at most.
        budget: Seconds after which no further round begins; at least three are done.
        device: Where the calls compute. A GPU's own clock is then taken instead, see `timing.timed`.
    """
    now = CLOCKS[clock]
    samples: dict[Key, list[float]] = {key: [] for key in runs}
    started = time.perf_counter()
    for done in range(rounds):
        spent = time.perf_counter() - started
        if budget is not None and done >= MIN_ROUNDS and spent * (done + 1) / done > budget:
            break
        for key, run in runs.items():
            if device is None or device.type == "cpu":
                samples[key] += _turn(run, now)
            else:
                samples[key].append(timed(run, device))
    return {key: _summed_up(values) for key, values in samples.items()}


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _turn(run: Callable[[], object], now: Callable[[], float]) -> list[float]:
    taken: list[float] = []
    while not taken or (sum(taken) < TURN_SECONDS and len(taken) < TURN_CALLS):
        started = now()
        run()
        taken.append(now() - started)
    return taken


def _summed_up(samples: list[float]) -> Timing:
    median = statistics.median(samples)
    if len(samples) < 2 or not median:
        return Timing(median, 0.0, len(samples))
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, (high - low) / median, len(samples))


def _averages() -> list[tuple[float, float, float]]:
    return [os.getloadavg()] if hasattr(os, "getloadavg") else []


def _busy() -> float | None:
    """CPU seconds used by anyone since the system started, steal by other guests among them."""
    file = Path("/proc/stat")
    if not file.exists():
        return None
    user, nice, system, _idle, _wait, *rest = map(int, file.read_text().split("\n")[0].split()[1:])
    return (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK")
