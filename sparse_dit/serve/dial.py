"""What the page lets a person choose: sizes, plans, and the points of a plan's front as a dial."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ..search.front import Point
from .card import Card
from .options import Limits
from .plans import DENSE, Served
from .spec import JobSpec

SCALES = (0.5, 0.75, 1.0, 1.5, 2.0)  # of the sizes that plans were made at
SIDE = 16  # pixels that the sides of scaled sizes are multiples of


@dataclass(frozen=True)
class Stop:
    """A stop of the dial.

    Attributes:
        ask: The speed-up that a request names to get it; None for the plan as it is.
        speedup, seconds, psnr_db: What is expected of it, as far as that is known: of a whole generation
            at the size and on the device that the plan was made for, against dense.
        density: Computed pairs / all pairs.
        measured: Whether the PSNR was measured, on prompts of the plan's search.
    """

    ask: float | None
    speedup: float | None
    density: float
    seconds: float | None
    psnr_db: float | None
    measured: bool = False


@dataclass(frozen=True)
class PlanChoice:
    """A plan as the page offers it.

    Attributes:
        name: What requests call it.
        stops: Its front by rising speed-up; one if there is no front.
        at: The number of the stop that is the plan as it is.
        settings: Size and steps that its forecasts are for.
        device: Where they are for.
    """

    name: str
    stops: list[Stop]
    at: int
    settings: dict[str, Any] = field(default_factory=dict)
    device: str | None = None

    @property
    def as_json(self) -> dict[str, Any]:
        """For the page's script."""
        return asdict(self)

    def at_speedup(self, speedup: float | None) -> int:
        """The number of the stop that a job with this speed-up ran at."""
        if speedup is None:
            return self.at
        asked = (n for n, s in enumerate(self.stops) if s.ask is not None and s.ask >= speedup)
        return next(asked, self.at)


def plan_choices(card: Card) -> list[PlanChoice]:
    """The plans of a server, in their order; without the choice to run dense."""
    return [_choice(served) for served in card.plans.values()]


def sizes(card: Card, limits: Limits) -> list[str]:
    """What the page offers, as `WIDTHxHEIGHT`: the sizes of plans, turned and scaled, that can be made."""
    made = [(s["width"], s["height"]) for s in _settings(card) if {"width", "height"} <= s.keys()]
    made.insert(0, (card.defaults.width, card.defaults.height))
    offered = {*made}
    for width, height in made:
        for scale in SCALES:
            w, h = (max(SIDE, round(side * scale / SIDE) * SIDE) for side in (width, height))
            offered |= {(w, h), (h, w)}
    fitting = [s for s in offered if s in made or _can_make(card, limits, *s)]
    return [f"{w}x{h}" for w, h in sorted(fitting, key=lambda s: (s[0] * s[1], s))]


def _settings(card: Card) -> Iterable[dict[str, Any]]:
    return (served.settings for served in card.plans.values())


def _can_make(card: Card, limits: Limits, width: int, height: int) -> bool:
    if width * height > limits.pixels:
        return False
    spec = JobSpec(
        kind=card.kind,
        prompt="any",
        seed=0,
        width=width,
        height=height,
        num_frames=card.defaults.num_frames,
        steps=card.defaults.steps,
        guidance=card.defaults.guidance,
        plan=DENSE,
        has_input=card.takes_image == "must",
    )
    try:
        card.check(spec)
    except ValueError:
        return False
    return True


def _choice(served: Served) -> PlanChoice:
    plan = served.plan
    measured = plan.measured.get("psnr_db")
    own = Stop(
        None,
        plan.forecast.get("speedup"),
        plan.density,
        plan.forecast.get("seconds"),
        plan.forecast.get("psnr_db") if measured is None else measured,
        measured is not None,
    )
    points = _best(served.front.points) if served.front else []
    stops = [Stop(p.speedup, p.speedup, p.density, p.seconds, p.psnr) for p in points]
    stops = [stop for stop in stops if not _same(stop, own)]
    stops.append(own)
    stops.sort(key=lambda stop: stop.speedup or 1.0)
    device = plan.provenance.get("device")
    return PlanChoice(served.name, stops, stops.index(own), served.settings, device)


def _best(points: Iterable[Point]) -> list[Point]:
    """The points that a request for their speed-up gets: none as fast has less error."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.speedup, p.error)):
        if not kept or (point.error < kept[-1].error and point.speedup < kept[-1].speedup):
            kept.append(point)
    return kept[::-1]


def _same(stop: Stop, own: Stop) -> bool:
    """Whether a point of the front is the plan itself."""
    near = own.speedup is not None and abs((stop.speedup or 0) - own.speedup) < 1e-3
    return near and abs(stop.density - own.density) < 1e-4
