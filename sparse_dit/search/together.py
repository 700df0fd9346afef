"""Sparse attention and a step cache together: each alone and both, measured on the same cases."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

from ..plan import Plan
from .caching import Cached, measured_scale, tried, with_cache
from .objective import PSNR
from .solve import Choice, least_loss
from .tune import FIRST_SCALE, Clock, Session, allowed_loss, tune
from .verify import Reference, Verified

SPARSE, CACHE, BOTH = "sparse alone", "cache alone", "both"
AS_FAST = "sparse alone, as fast as both"


class Tuned(NamedTuple):
    """What a tuning came to, and of which session."""

    session: Session
    choice: Choice
    plan: Plan
    verified: Verified

    @property
    def scale(self) -> float:
        """Measured over forecast loss."""
        loss, measured = self.choice.loss, self.verified.difference[self.session.work.loss]
        return measured_scale(measured, loss, self.session.spoilt) if loss > 0 else FIRST_SCALE


class Together(NamedTuple):
    """The better of a plan alone and one with a step cache, and what all that was measured gave.

    `compared` has an entry for each way: `what`, `cache`, `density`, `computed` (share of attention calls
    that ran), `psnr_db`, `psnr_db_least`, `speedup`, and `forecast` where the PSNR is one.
    """

    best: Tuned
    compared: list[dict[str, Any]]


def tuned_alone(
    session: Session, references: list[Reference], budget: float, clock: Clock
) -> Tuned | None:
    """The plan without a cache; None if its speed-up is out of reach and a cache may bring it there.

    Raises:
        ValueError: See `tune`.
    """
    try:
        return Tuned(session, *tune(session, references, budget, clock))
    except ValueError as error:
        if not session.options.caches or session.options.target_speedup is None:
            raise
        session.options.say(f"without a step cache: {error}")
        return None


def together(
    session: Session,
    references: list[Reference],
    alone: Tuned | None,
    budget: float,
    clock: Clock,
) -> Together:
    """Try the step caches that are asked for alone, and the most promising one with sparse attention.

    Args:
        session: That of the search without a cache.
        references: Dense, uncached generations, which all is compared with.
        alone: What `tuned_alone` gave.
        budget, clock: See `tune`.

    Raises:
        ValueError: If nothing reaches the speed-up, or an output holds NaN or Inf.
    """
    options, work = session.options, session.work
    compared = [] if alone is None else [_row(SPARSE, alone)]
    scale = FIRST_SCALE if alone is None else alone.scale

    def seen(one: Cached) -> None:
        row = _cache_row(one, work.quality)
        compared.append(row)
        options.say(
            f"step cache {one.cache} alone: {one.computed:.0%} of the attention calls, "
            f"{row['speedup']:.2f}x at {row[work.quality]:.1f} dB"
        )

    found = tried(work, references, options.caches, lambda one: _too_bold(session, one), seen)
    sessions = [
        replace(session, problem=with_cache(session.problem, references, one), cached=one)
        for one in found
    ]
    ranked = [
        (rank, n) for n, one in enumerate(sessions) if (rank := _rank(one, scale)) is not None
    ]
    both = None
    if ranked:
        chosen = sessions[min(ranked)[1]]
        assert chosen.cached is not None, "it was made with one"
        options.say(f"sparse attention with the step cache {chosen.cached.cache}")
        both = Tuned(chosen, *tune(chosen, references, budget, clock, scale))
        compared.append(_row(BOTH, both))
        if alone is not None and (equal := _as_fast(alone, both.verified.speedup)):
            compared.append(equal)
    best = _better(alone, both)
    if best is None:
        raise ValueError(
            f"target_speedup {options.target_speedup:g} is out of reach on this device, with the step cache "
            f"{options.cache} too; ask for less"
        )
    if best is alone:
        options.say("no step cache makes the plan faster at what is asked for: it has none")
    return Together(best, compared)


def _too_bold(session: Session, one: Cached) -> bool:
    """Whether a cache leaves sparse attention nothing to do: it misses the PSNR, or is fast enough alone."""
    options = session.options
    if options.min_psnr is not None:
        return one.difference[PSNR] < options.min_psnr
    return one.pairs.speedup > (options.target_speedup or math.inf)


def _rank(session: Session, scale: float) -> float | None:
    """What is expected of the best choice with a cache, the less the better; None if there is none."""
    wanted, cached = session.options.min_psnr, session.cached
    assert cached is not None, "it was made with one"
    if wanted is not None:
        if cached.difference[PSNR] < wanted:
            return None
        return session.choose(allowed_loss(wanted, scale, spoilt=session.spoilt)).seconds
    try:
        return session.spoilt + scale * session.choose(math.inf).loss
    except ValueError:  # out of reach
        return None


def _better(alone: Tuned | None, both: Tuned | None) -> Tuned | None:
    """The one that meets a PSNR faster, or is nearer to it; for a speed-up that of the higher PSNR."""
    known = [one for one in (alone, both) if one is not None]
    if len(known) < 2:
        return known[0] if known else None
    wanted = known[0].session.options.min_psnr
    if wanted is not None:
        good = [one for one in known if one.verified.difference[PSNR] >= wanted]
        if good:
            return min(good, key=lambda one: one.choice.seconds)
    return max(known, key=lambda one: one.verified.difference[PSNR])


def _row(what: str, tuned: Tuned) -> dict[str, Any]:
    verified, cached = tuned.verified, tuned.session.cached
    values = [case[tuned.session.work.quality] for case in verified.by_case]
    return {
        "what": what,
        "cache": None if cached is None else str(cached.cache),
        "density": round(tuned.choice.density, 4),
        "computed": 1.0 if cached is None else round(cached.computed, 4),
        **_quality(tuned.session.work.quality, values),
        "speedup": round(verified.speedup, 4),
    }


def _cache_row(one: Cached, quality: str) -> dict[str, Any]:
    return {
        "what": CACHE,
        "cache": str(one.cache),
        "density": 1.0,
        "computed": round(one.computed, 4),
        **_quality(quality, [case[quality] for case in one.by_case]),
        "speedup": round(one.pairs.speedup, 4),
    }


def _quality(name: str, values: list[float]) -> dict[str, float]:
    return {name: round(sum(values) / len(values), 2), f"{name}_least": round(min(values), 2)}


def _as_fast(alone: Tuned, speedup: float) -> dict[str, Any] | None:
    """What sparse attention alone would give at a speed-up, by forecast; None if it doesn't get there."""
    choice = least_loss(alone.session.problem, speedup)
    if choice is None or choice.loss <= 0:
        return None
    return {
        "what": AS_FAST,
        "cache": None,
        "density": round(choice.density, 4),
        "computed": 1.0,
        PSNR: round(-10 * math.log10(choice.loss * alone.scale), 2),
        "speedup": round(choice.speedup, 4),
        "forecast": True,
    }
