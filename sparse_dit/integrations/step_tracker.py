"""Which guidance branch, run and step a forward belongs to."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor

from ..call import Branch, StepContext
from .families import BRANCHES, Family
from .families.family import Arguments
from .schedule import Move, Schedule

CONDITION = "encoder_hidden_states"
INPUT = "hidden_states"


class StepTracker:
    """Says of each forward which guidance branch, step and run it belongs to, from those before it.

    The scheduler tells runs and steps where the pipeline is known. Elsewhere they are guessed: noise falls
    over a run, and pipelines name a forward (`transformer.cache_context`) or don't; forwards without a name
    belong to one step if they are given the same noise level and latents and other conditions. A copy starts
    anew.

    Args:
        schedule: The scheduler of the pipeline that the transformer belongs to.
    """

    def __init__(self, schedule: Schedule | None = None) -> None:
        self._schedule = schedule or Schedule()
        self._begins = False
        self._seen: list[Any] = []  # names, or conditions of forwards without a name
        self._input: Any = None
        self._first_sigma = 0.0
        self._conditions: list[tuple[weakref.ref[Tensor], int]] = []
        self._numbered = 0

    def begin(self) -> None:
        """Let the next forward begin a run, whatever its noise level."""
        self._begins = True

    def condition(self, arguments: Arguments) -> int | None:
        """The number of the tensor object that a forward is conditioned on; see `StepContext`."""
        tensor = arguments.get(CONDITION)
        if not isinstance(tensor, Tensor):
            return None
        self._conditions = [known for known in self._conditions if known[0]() is not None]
        for reference, number in self._conditions:
            if reference() is tensor:
                return number
        self._conditions.append((weakref.ref(tensor), self._numbered))
        self._numbered += 1
        return self._conditions[-1][1]

    def __deepcopy__(self, memo: dict[int, Any]) -> StepTracker:
        return StepTracker(copy.deepcopy(self._schedule, memo))

    def __reduce__(self):
        return StepTracker, ()

    def advance(
        self,
        last: StepContext,
        family: Family,
        arguments: Arguments,
        sigma: float,
        name: str | None,
    ) -> tuple[Branch, int, int]:
        """The guidance branch of a forward, and the numbers of its run and of its step in it, from 0.

        Args:
            last: The context of the forward before it.
            family: The family of the transformer.
            arguments: The arguments of the forward, by name.
            sigma: The noise level of the forward, from 1 (noise) to 0 (clean).
            name: The branch as the pipeline names it (`transformer.cache_context`); None if it doesn't.
        """
        key = name or arguments.get(CONDITION)
        place = next((n for n, seen in enumerate(self._seen) if _equal(seen, key)), None)
        branch = BRANCHES.get(name, "any") if name else self._unnamed(family, place)
        move, other_ran = self._schedule.next_move(last.sigma == sigma)
        if other_ran:
            self._conditions.clear()  # numbered anew: nothing is taken again from before this point
        if self._begins or last.sigma is None:
            move = "run"
        elif move is None:
            move = self._guess(last, arguments, sigma, name, place)
        run, step = last.run, last.step
        if move == "run":
            self._first_sigma, self._begins = sigma, False
            run, step = run + 1, 0
        elif move == "step":
            step += 1
        if move != "same":
            self._seen = []
        if not name and not self._seen:
            branch = self._unnamed(family, None)
        if not self._seen or place is None:
            self._seen.append(key)
        self._input = None if name else arguments.get(INPUT)
        return branch, run, step

    def _guess(
        self,
        last: StepContext,
        arguments: Arguments,
        sigma: float,
        name: str | None,
        place: int | None,
    ) -> Move:
        """What begins with a forward of which the scheduler tells nothing.

        At the noise level of a run's start another run is known by its other condition, or by the latents,
        which a step would have changed. Where one comes back to a noise level otherwise, it is a step of the
        same run, but one that nothing is taken over to.
        """
        assert last.sigma is not None, "else a run begins"
        if sigma > last.sigma:
            return "run"
        again = bool(self._seen) and (
            place is not None if name else not self._one_step(last, arguments, place)
        )
        if again and sigma == last.sigma and not self._schedule.leads:
            at_start = last.step == 0 and sigma == self._first_sigma
            restarted = _same_noise(arguments.get(INPUT), self._input)
            if at_start and (restarted or not self._is_known(arguments.get(CONDITION))):
                return "run"
            self._conditions.clear()
        return "step" if again or sigma < last.sigma else "same"

    def _is_known(self, condition: Any) -> bool:
        """Whether a forward before was conditioned on this very tensor."""
        return any(known() is condition for known, _ in self._conditions)

    def _unnamed(self, family: Family, place: int | None) -> Branch:
        """The first condition of a step is the prompt's, the second the other branch's."""
        place = len(self._seen) if place is None else place
        if not family.two_calls or place > 1:
            return "any"
        return "uncond" if place else "cond"

    def _one_step(self, last: StepContext, arguments: Arguments, place: int | None) -> bool:
        """Whether a forward without a name continues the step, at one noise level.

        The prompt again may be a third prediction (skipped layers), but not in a run's first step: there
        it is the next run of a single step.
        """
        if place is not None and last.step == 0:
            return False
        return _same_noise(arguments.get(INPUT), self._input)


def _equal(a: Any, b: Any) -> bool:
    """Whether two conditions are the same; reads them back unless they are one tensor."""
    if a is b or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))


def _same_noise(a: Any, b: Any) -> bool:
    """Whether two forwards' latents are the same, but for frames that are given; reads them back."""
    if a is b:
        return a is not None
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape:
        return False
    return (a == b.to(a.device)).float().mean().item() > 0.5
