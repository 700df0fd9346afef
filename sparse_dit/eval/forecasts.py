"""What a plan forecast beside what was measured of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from ..plan import Plan
from .quality import Quality


@dataclass(frozen=True)
class Compared:
    """One quantity, forecast by the plan and measured.

    Attributes:
        name: The name of the quantity.
        kind: Its unit, which says how it is written.
        forecast: What the plan forecasts; None if it doesn't.
        measured: What was measured.
    """

    name: str
    kind: Literal["times", "seconds", "share", "decibels"]
    forecast: float | None
    measured: float

    @property
    def off(self) -> str:
        """How far the measured is from the forecast, in words: percent, or dB."""
        if self.forecast is None or not (math.isfinite(self.measured) and self.forecast):
            return "-"
        if self.kind == "decibels":
            return f"{self.measured - self.forecast:+.1f} dB"
        return f"{self.measured / self.forecast - 1:+.1%}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, but for what is infinite or not a number."""
        return {"name": self.name, "forecast": self.forecast, "measured": self.measured}


def compared(plan: Plan, quality: Quality, expected_psnr_db: float | None) -> list[Compared]:
    """Speed, seconds, density and likeness, forecast and measured.

    Args:
        plan: The plan, which holds its forecast.
        quality: What was measured of it.
        expected_psnr_db: What the search let expect of the PSNR, see `expected_psnr`.
    """
    forecast = {name: _number(plan.forecast.get(name)) for name in ("seconds", "dense_seconds")}
    return [
        Compared("speed-up", "times", quality.forecast_speedup, quality.speedup),
        Compared("dense generation", "seconds", forecast["dense_seconds"], quality.dense_seconds),
        Compared("sparse generation", "seconds", forecast["seconds"], quality.sparse_seconds),
        Compared("density", "share", plan.density, quality.density),
        Compared("PSNR against dense", "decibels", expected_psnr_db, quality.psnr_db),
    ]


def expected_psnr(plan: Plan) -> float | None:
    """PSNR in dB that a plan's search forecast, or else verified on its own prompts; None if neither."""
    forecast = _number(plan.forecast.get("psnr_db"))
    return _number(plan.measured.get("psnr_db")) if forecast is None else forecast


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if known and math.isfinite(value) else None
