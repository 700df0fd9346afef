"""What a pipeline's scheduler tells of a forward: whether a generation or a step begins with it."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor

Move = Literal["run", "step", "same"]
COUNTERS = (
    "step_index",
    "counter",
)  # the second is PNDM's; DDIM and DDPM, whose noise falls, have none


class Schedule:
    """The scheduler of one pipeline, which is read before each forward and never written to.

    A pipeline begins a generation with `set_timesteps`, which makes a new tensor of timesteps, whatever noise
    it starts at and however the generation before it ended. Most schedulers also count their steps. Both are
    sure, while noise levels can be equal in neighbours (rounded in half precision, second-order schedulers)
    or rise.

    The scheduler is asked of the pipeline each time, as people replace it. A deep copy of the pipeline has
    its own; of a transformer that is copied or pickled alone no pipeline is known.
    """

    def __init__(self, pipe: Any = None) -> None:
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._timesteps: weakref.ref[Tensor] | None = None
        self._index: int | None = None
        self.leads = False  # whether the present generation is one of this pipeline

    def __deepcopy__(self, memo: dict[int, Any]) -> Schedule:
        return Schedule(None if self.pipe is None else memo.get(id(self.pipe)))

    def __reduce__(self):
        return Schedule, ()

    @property
    def pipe(self) -> Any:
        """The pipeline; None if none is known, or it is gone."""
        return None if self._pipe is None else self._pipe()

    def next_move(self, same_noise: bool) -> tuple[Move | None, bool]:
        """What begins with the next forward, and whether another pipeline may have run in between.

        The first is `"run"`, `"step"` or `"same"` (neither begins), or None if the scheduler doesn't say.

        Args:
            same_noise: Whether the next forward has the noise level of the one before it.
        """
        scheduler = getattr(self.pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, Tensor):
            self.leads = False
            return None, False
        counter = next((name for name in COUNTERS if hasattr(scheduler, name)), None)
        index: int | None = None if counter is None else getattr(scheduler, counter)
        stepped, self._index = index != self._index, index
        if self._timesteps is None or self._timesteps() is not timesteps:
            self._timesteps, self.leads = weakref.ref(timesteps), True
            return "run", False
        if not self.leads:
            return None, stepped  # it takes turns with a pipeline that isn't known
        if stepped:
            return "step", False
        if counter is None:
            return None, False
        if same_noise:
            return "same", False
        self.leads = False  # other noise without a step: not this pipeline's
        return None, True


def steps_of(pipe: Any) -> int | None:
    """Steps of the generation that a pipeline is in, or was in last; None if its scheduler doesn't tell."""
    timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
    if not isinstance(timesteps, Tensor) or not timesteps.numel():
        return None
    return len(timesteps.unique())  # second-order schedulers name most of them twice


SHIFTS = ("flow_shift", "shift")  # what schedulers call the shift of their noise levels


def shifted_scheduler(pipe: Any, shift: float | None) -> Any:
    """A scheduler like the pipeline's with this shift of the noise levels; the very same for None.

    Raises:
        ValueError: If the scheduler has no such shift.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if shift is None:
        return scheduler
    taken = inspect.signature(type(scheduler).__init__).parameters
    name = next((name for name in SHIFTS if name in taken), None)
    if name is None or scheduler is None:
        raise ValueError(f"{type(scheduler).__name__} has no shift: leave out flow_shift")
    return type(scheduler).from_config(scheduler.config, **{name: shift})


@contextmanager
def flow_shifted(pipe: Any, shift: float | None) -> Iterator[None]:
    """Inside the block the pipeline's noise levels are shifted; None leaves them as they are."""
    if shift is None:
        yield
        return
    before = pipe.scheduler
    pipe.scheduler = shifted_scheduler(pipe, shift)
    try:
        yield
    finally:
        pipe.scheduler = before


def noise_level(pipe: Any, share: float, steps: int = 50) -> float:
    """The noise level that a pipeline's schedule reaches after a share of its steps, from 1 to 0.

    Where a pipeline's scheduler doesn't tell, or there is none, levels are taken as even.

    Args:
        pipe: A pipeline, which isn't changed, or a transformer alone.
        share: From 0 to 1.
        steps: How many steps are looked at; between two of them the level is in the middle.
    """
    first = round(share * steps)
    if first <= 0 or first >= steps:
        return 1.0 if first <= 0 else 0.0
    scheduler: Any = copy.deepcopy(getattr(pipe, "scheduler", None))
    try:
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps.flatten().double()
        levels = times / float(scheduler.config.num_train_timesteps)
    except (AttributeError, TypeError, ValueError):  # none, or one that needs more than a number
        return 1 - share
    if levels[-1] > levels[0]:
        levels = 1 - levels
    at = round(share * len(levels))  # schedules of a higher order have more of them
    return min(1.0, max(0.0, round(float(levels[at - 1] + levels[at]) / 2, 4)))
