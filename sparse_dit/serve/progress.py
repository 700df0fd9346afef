"""How far a job is, and how long it still takes."""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from .spec import JobSpec

KEPT = 64  # kinds of job whose times are remembered
MOST_PERCENT = 99  # until the files are in place
LATEST = 8  # steps that tell how fast the machine is now


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
        forecast: The seconds that the plan expects of each generation of the job; empty if it doesn't.
        clock: Seconds.
    """

    def __init__(
        self,
        spec: JobSpec,
        times: Times,
        forecast: Sequence[float] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._spec, self._clock, self._times = spec, clock, times
        known = times.of(spec)
        self._told = known is not None or len(forecast) > 0
        self._expected = known or _spread(spec, forecast)
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
        """What is left of an earlier job's seconds, or of the forecast, at the speed of the latest steps.

        Before there are two steps, whose distance tells that speed, it counts as what was expected.
        """
        elapsed = self._clock() - self._begun
        marks, expected = self._marks, self._expected
        if len(marks) < 2 and not self._told:
            if not marks:
                return None
            slower = marks[0] / expected[0]
        else:
            slower = self._slower()
        done, since = (expected[self.step - 1], elapsed - marks[-1]) if marks else (0.0, elapsed)
        return max(0.0, slower * (expected[-1] - done) - since)

    def _slower(self) -> float:
        """How many times as long as expected the latest steps took; 1 before there are two."""
        last = len(self._marks) - 1
        first = max(0, last - LATEST)
        expected = self._expected[last] - self._expected[first] if last > 0 else 0.0
        return (self._marks[last] - self._marks[first]) / expected if expected > 0 else 1.0

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


def _spread(spec: JobSpec, forecast: Sequence[float]) -> list[float]:
    """As `Times.of` has them, of seconds that are forecast of each generation, or of steps of a second."""
    each = [seconds / spec.steps for seconds in forecast] or [1.0] * (
        spec.total_steps // spec.steps
    )
    marks = list(itertools.accumulate(step for step in each for _ in range(spec.steps)))
    return [*marks, marks[-1]]


def _kind(spec: JobSpec) -> tuple[Any, ...]:
    """What jobs that take equally long have in common."""
    size = (spec.kind, spec.width, spec.height, spec.num_frames, spec.steps, spec.guidance > 1)
    return (*size, spec.plan, spec.speedup, spec.compare, spec.negative_prompt is None)
