"""How far a job is, and how long it still takes."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from .spec import JobSpec

KEPT = 64  # kinds of job whose times are remembered
MOST_PERCENT = 99  # until the files are in place


class Times:
    """How long the steps of earlier jobs took, by what they had in common."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[Any, ...], list[float]] = OrderedDict()

    def of(self, spec: JobSpec) -> list[float] | None:
        """Seconds from a job's begin to the end of each step, and to its end; None if no such job ran."""
        return self._known.get(_kind(spec))

    def keep(self, spec: JobSpec, marks: list[float]) -> None:
        """Remember those of a job that is done."""
        self._known[_kind(spec)] = marks
        self._known.move_to_end(_kind(spec))
        while len(self._known) > KEPT:
            self._known.popitem(last=False)


class Progress:
    """Counts a job's steps.

    Args:
        spec: The job.
        times: Those of earlier jobs.
        forecast: The seconds that the plan expects of the whole job, if it does.
        clock: Seconds.
    """

    def __init__(
        self,
        spec: JobSpec,
        times: Times,
        forecast: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._spec, self._clock = spec, clock
        self._times, self._forecast = times, forecast
        self._known = times.of(spec)
        self._begun = clock()
        self._marks: list[float] = []
        self.previews: list[int] = []

    @property
    def step(self) -> int:
        """Steps that are done, of all generations of the job."""
        return len(self._marks)

    @property
    def percent(self) -> int:
        """How much of the job is done, in percent, at most 99 until its files are there."""
        return min(MOST_PERCENT, 100 * self.step // max(1, self._spec.total_steps))

    def stepped(self) -> None:
        """A step is done."""
        self._marks.append(self._clock() - self._begun)

    def finished(self) -> float:
        """The job is done, and the next one like it is told better; the seconds are returned."""
        seconds = self._clock() - self._begun
        if self.step == self._spec.total_steps:
            self._times.keep(self._spec, [*self._marks, seconds])
        return seconds

    def seconds_left(self) -> float | None:
        """From what an earlier job took, else from the plan's forecast, corrected by the steps so far."""
        elapsed = self._clock() - self._begun
        if self._known is not None:
            whole, there = self._known[-1], self._known[self.step - 1] if self.step else 0.0
            ratio = self._marks[-1] / there if self.step and there > 0 else 1.0
            return max(0.0, whole * ratio - elapsed)
        if self.step:
            by_steps = self._marks[-1] / self.step * self._spec.total_steps
            if self._forecast is None:
                return max(0.0, by_steps - elapsed)
            share = self.step / self._spec.total_steps
            return max(0.0, share * by_steps + (1 - share) * self._forecast - elapsed)
        return None if self._forecast is None else max(0.0, self._forecast - elapsed)

    def detail(self, phase: str) -> dict[str, Any]:
        """What the store keeps of it."""
        left = self.seconds_left()
        return {
            "phase": phase,
            "step": self.step,
            "steps": self._spec.total_steps,
            "seconds_left": None if left is None else round(left, 2),
            "previews": list(self.previews),
        }


def _kind(spec: JobSpec) -> tuple[Any, ...]:
    """What jobs that take equally long have in common."""
    size = (spec.kind, spec.width, spec.height, spec.num_frames, spec.steps, spec.guidance > 1)
    return (*size, spec.plan, spec.speedup, spec.compare, spec.negative_prompt is None)
