"""Solve, generate with the plan, and correct the forecast by what came out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..integrations import Workload
from ..plan import Plan
from ..step_cache import NAMED
from ..timing import Timer
from .assemble import first_plan, stage_shares
from .caching import Cached, measured_scale
from .cost import Costs
from .objective import PSNR
from .options import SearchOptions
from .profile import Profile
from .sensitivity import Sensitivity
from .solve import Choice, Problem
from .verify import Reference, Verified, verify

MARGIN_DB = 1.5  # how far above the wanted PSNR plans are made, as other prompts give less
# Measured over forecast loss, before a round has measured it: the geometric mean over three prompts of
# the embedded model at 4,608 tokens and 12 steps, which range from 4 to 22 at density 0.3. Only a whole run
# of the prompt tells it.
FIRST_SCALE = 7.5
RELAX_DB = 3.0  # further above than this, another round is spent on speed
MAX_ROUNDS = 4
DECLINED = 0.999  # of the dense seconds: what isn't faster than this is all dense


class Clock:
    """A clock that keeps in `laps` what each phase took, and `"total"`, in seconds.

    Args:
        device: The device that the pipeline computes on; see `Taken` for what its seconds are.
    """

    def __init__(self, device: torch.device) -> None:
        self.laps: dict[str, float] = {"total": 0.0}
        self._device = device
        self._whole, self._lap = Timer(device), Timer(device)

    def lap(self, name: str) -> None:
        """End phase `name`: the time since the last call is added to it."""
        self.laps[name] = self.laps.get(name, 0.0) + self._lap.stop().seconds
        self._lap = Timer(self._device)
        self.laps["total"] = self.elapsed

    @property
    def elapsed(self) -> float:
        """The seconds since the clock was made."""
        return self._whole.stop().seconds


@dataclass(frozen=True, eq=False)
class Session:
    """What stays the same while a choice is tuned.

    Args:
        options: What the search was asked for.
        work: What is run to verify; the model is not patched.
        sensitivity: How sensitive the output is to errors of each transformer, by component name.
        problem: The units, with what each of their candidates costs and spoils.
        tables: What attention costs in each transformer, by component name.
        profile: The profile that the problem was made of.
        cached: What the step cache gives alone that the problem was made for; None without one.
    """

    options: SearchOptions
    work: Workload
    sensitivity: Mapping[str, Sensitivity]
    problem: Problem
    tables: Mapping[str, Costs]
    profile: Profile
    cached: Cached | None = None

    @property
    def spoilt(self) -> float:
        """The loss that the step cache comes to alone."""
        return 0.0 if self.cached is None else self.cached.difference[self.work.loss]

    def plan(self, choice: Choice) -> Plan:
        """A choice as a plan."""
        parts = self.profile.components
        plan = first_plan(type(self.work.model).__name__, parts, self.problem, choice, self.tables)
        noted: dict[str, Any] = {"stage_shares": stage_shares(self.problem)}
        if self.cached is not None:
            noted[NAMED] = self.cached.cache.to_dict()
        return replace(plan, provenance=noted)

    def choose(self, loss: float) -> Choice:
        """What answers the objective, at a largest loss if it asks for a PSNR."""
        return self.options.objective.choose(self.problem, loss)


def allowed_loss(
    min_psnr: float | None, scale: float = FIRST_SCALE, floor: float = 0.0, spoilt: float = 0.0
) -> float:
    """The largest forecast loss of a plan that should reach a PSNR in dB; infinite if none is asked for.

    Args:
        min_psnr: What is asked for.
        scale: Measured over forecast loss.
        floor: PSNR to aim at in any case.
        spoilt: Mean squared change of the video that is there without the plan, by a step cache.
    """
    if min_psnr is None:
        return math.inf
    return max(10 ** (-max(min_psnr + MARGIN_DB, floor) / 10) - spoilt, 0.0) / scale


def tune(
    session: Session,
    references: list[Reference],
    budget: float,
    clock: Clock,
    scale: float = FIRST_SCALE,
) -> tuple[Choice, Plan, Verified]:
    """The choice that meets the objective, as a plan, and what it gave on the held-out cases.

    For `min_psnr` it is found in several rounds; if none reaches the PSNR, that of the highest one is
    returned.

    Args:
        session: What the plan is chosen from, and by what.
        references: Dense generations that the sparse ones are compared with.
        budget: Seconds on the clock after which a plan that is good enough is not improved.
        clock: A clock that runs since the search began.
        scale: Measured over forecast loss, before a round has measured it.

    Raises:
        ValueError: If the objective is out of reach, or the sparse output holds NaN or Inf.
    """
    wanted, say = session.options.min_psnr, session.options.say
    floor, spoilt = 0.0, session.spoilt  # dB to aim at; the cache's own loss
    best: tuple[Choice, Plan, Verified] | None = None  # the fastest that is good
    closest: tuple[Choice, Plan, Verified] | None = None  # of the highest PSNR, if none is
    for number in range(MAX_ROUNDS):
        last = _round(
            session, session.choose(allowed_loss(wanted, scale, floor, spoilt)), references
        )
        choice, _, verified = last
        say(
            f"round {number + 1}: density {choice.density:.3f}, forecast {choice.speedup:.2f}x, "
            f"{_speed(verified)} at {_likeness(session.work, verified)}"
        )
        if verified.pairs and (caution := verified.pairs.caution):
            say(caution)
        if wanted is None:
            return last
        good = verified.difference[PSNR] >= wanted
        if closest is None or verified.difference[PSNR] > closest[2].difference[PSNR]:
            closest = last
        if good and (best is None or choice.seconds < best[0].seconds):
            best = last
        if choice.loss == 0:
            break
        scale = measured_scale(verified.difference[session.work.loss], choice.loss, spoilt)
        spent = clock.elapsed + verified.sparse_seconds > budget
        if best and (spent or verified.difference[PSNR] <= wanted + RELAX_DB):
            break
        if not good:  # aim higher than last time
            floor = max(floor, wanted + MARGIN_DB * (number + 2) / 2)
    assert closest is not None, "there is at least one round"
    return best or closest


def _speed(verified: Verified) -> str:
    """What was measured of a round's speed-up, in words."""
    if verified.pairs is None:
        return "all dense, so no speed-up to measure,"
    return f"measured {verified.speedup:.2f}x"


def _likeness(work: Workload, verified: Verified) -> str:
    """How near the outputs are to dense ones, in words."""
    value = verified.difference[work.quality]
    return f"{value:.1f} dB" if work.quality == PSNR else f"{work.quality} {value:.3g}"


def _round(
    session: Session, choice: Choice, references: list[Reference]
) -> tuple[Choice, Plan, Verified]:
    if choice.seconds >= session.problem.dense_seconds * DECLINED:
        session.options.say(
            "no sparse choice that meets the objective is faster than dense: the plan is all dense"
        )
    plan = session.plan(choice)
    return choice, plan, verify(session.work, plan, references, session.options.backend)
