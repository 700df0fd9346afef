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
        """Seconds of making; a call that was no slower for counting counts as nothing."""
        return self._found.seconds + max(0.0, self._counted.seconds - self._again.seconds)

    @property
    def seconds_again(self) -> float:
        """Seconds of the calls that were computed once more."""
        return self._again.seconds

    def find(self, work: Callable[[], Result], device: torch.device) -> Result:
        """What `work`, which finds or learns an index, returns."""
        return self._found.run(work, device)

    def count(self, attend: Callable[..., Result], mass_block: int, device: torch.device) -> Result:
        """What `attend` returns: a call's attention, which counts probability if it is given a block."""
        result = self._counted.run(lambda: attend(mass_block), device)
        self._again.run(attend, device)
        return result


def timed(making: Making | None, work: Callable[[], Result], device: torch.device) -> Result:
    """What `work`, which finds or learns an index, returns; timed if somebody wants to know."""
    return work() if making is None else making.find(work, device)


def counted(
    making: Making | None, attend: Callable[..., Result], mass_block: int, device: torch.device
) -> Result:
    """What `attend` returns with probability counted; timed if somebody wants to know."""
    return attend(mass_block) if making is None else making.count(attend, mass_block, device)
