"""How long it takes to make the indices that are found in calls, while somebody wants to know."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from .timing import Stopwatch

Result = TypeVar("Result")


class Making:
    """The seconds of index making of a patched model, and those that only the measurement takes.

    Making is what finds an index or learns one from counted probability, and what counting adds to a call's
    attention: for that such a call is computed once more without.
    """

    def __init__(self) -> None:
        self._found, self._counted, self._again = Stopwatch(), Stopwatch(), Stopwatch()

    @property
    def seconds(self) -> float:
        """Of making; a call that was no slower for counting counts as nothing."""
        return self._found.seconds + max(0.0, self._counted.seconds - self._again.seconds)

    @property
    def seconds_again(self) -> float:
        """Of the calls that were computed once more."""
        return self._again.seconds

    def find(self, work: Callable[[], Result], device: torch.device) -> Result:
        """What `work`, which finds or learns an index, returns."""
        return self._found.run(work, device)

    def count(
        self, counted: Callable[[], Result], plain: Callable[[], object], device: torch.device
    ) -> Result:
        """What `counted` returns: a call's attention with probability counted, `plain` without."""
        result = self._counted.run(counted, device)
        self._again.run(plain, device)
        return result
