"""What a pipeline's scheduler tells of a forward: whether a generation or a step begins with it."""

from __future__ import annotations

import weakref
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
