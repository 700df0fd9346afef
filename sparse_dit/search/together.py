"""Sparse attention and a step cache together: each alone and both, measured on the same cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..plan import Plan
from .caching import Cached, measured_scale, tried, with_cache
from .objective import PSNR
from .solve import Choice, all_dense, least_loss
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
    """The best of a plan alone, a step cache alone, and both, and what all that was measured gave.

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
            f"{'' if one.computed < 1 else ': it leaves nothing out'}"
        )

    found = tried(work, references, options.caches, lambda one: _too_bold(session, one), seen)
    sessions = [
        replace(session, problem=with_cache(session.problem, references, one), cached=one)
        for one in found
        if one.computed < 1
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
    best = _best(alone, both, [_all_dense(one) for one in sessions])
    if best is None:
        raise ValueError(
            f"target_speedup {options.target_speedup:g} is out of reach on this device, with the step cache "
            f"{options.cache} too; ask for less"
        )
    if best is alone:
        options.say("no step cache makes the plan faster at what is asked for: it has none")
    elif best is not both:
        assert best.session.cached is not None, "only the plan alone has none"
        options.say(
            f"the step cache {best.session.cached.cache} alone is better at what is asked for than with "
            "sparse attention: the plan is all dense, and has it"
        )
    return Together(best, compared)


def _all_dense(session: Session) -> Tuned:
    """A step cache with all attention dense, as it was measured when it was tried."""
    cached = session.cached
    assert cached is not None, "it was made with one"
    choice, taken = all_dense(session.problem), sum(run.seconds for run in cached.runs)
    verified = Verified(
        cached.difference, cached.pairs.speedup, taken, cached.pairs, cached.by_case
    )
    return Tuned(session, choice, session.plan(choice), verified)


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


def _best(alone: Tuned | None, both: Tuned | None, cached: Sequence[Tuned]) -> Tuned | None:
    """The fastest that meets a PSNR, or the nearest to it; for a speed-up that of the highest PSNR.

    Args:
        alone, both: The plan without a step cache and with one, each if there is one.
        cached: The step caches alone. One that meets what is asked for takes the place of a plan that
            doesn't, and of one with sparse attention that is measured to be no faster.
    """
    sparse = [one for one in (alone, both) if one is not None]
    known = [*sparse, *cached]
    if not known:
        return None
    options = known[0].session.options
    if (wanted := options.min_psnr) is not None:
        good = [one for one in sparse if _psnr(one) >= wanted]
        best = min(good, key=lambda one: one.choice.seconds, default=None)
        dense = max((one for one in cached if _psnr(one) >= wanted), key=_speed, default=None)
        if dense is None:
            return best or max(known, key=_psnr)
        return dense if best is None or _speed(dense) >= _speed(best) else best
    fast = [one for one in known if _speed(one) >= (options.target_speedup or 0.0)]
    return max(fast or sparse, key=_psnr, default=None)


def _psnr(one: Tuned) -> float:
    return one.verified.difference[PSNR]


def _speed(one: Tuned) -> float:
    """The speed-up as measured, or by forecast if it is another device's."""
    device = one.session.options.target_device
    here = device is None or device.table.here
    return one.verified.speedup if here else one.choice.speedup


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
