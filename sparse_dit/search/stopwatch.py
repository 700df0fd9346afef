"""Seconds that a device spends on some of a generation's work, without making it wait."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor


class Stopwatch:
    """Adds up the time of calls; on a GPU by events in its queue, which are read at the end."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.Event, torch.Event]] = []

    def run(self, work: Callable[[], Tensor], device: torch.device) -> Tensor:
        """What `work` returns, which the device computes."""
        if device.type == "cpu":
            started = time.perf_counter()
            result = work()
            self._seconds += time.perf_counter() - started
            return result
        start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        start.record()
        result = work()
        end.record()
        self._events.append((start, end))
        return result

    @property
    def seconds(self) -> float:
        """Of all calls; waits for the last one."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1e3
        self._events.clear()
        return self._seconds
