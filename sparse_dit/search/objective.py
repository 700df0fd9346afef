"""What is asked of a search, and the choice that answers it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..plan import Plan
from ..words import option
from .local import improve
from .solve import Choice, Problem, at_price, cheapest, least_loss

PSNR = "psnr_db"  # the metric that `min_psnr` is about, which the model's host must measure
_ABOVE = {"target_speedup": 1.0, "max_error": 0.0, "min_psnr": 0.0}
_MOST = {"min_psnr": 100.0}  # what videos that are equal count as


@dataclass(frozen=True)
class Objective:
    """What is asked for; exactly one is set.

    Args:
        target_speedup: Forecast speed-up of the whole generation, with the least loss.
        max_error: Largest root-mean-square relative error of head outputs (weighted by how much they
            matter), as fast as possible.
        min_psnr: Least PSNR in dB against the dense video on held-out cases, as fast as possible.

    Raises:
        ValueError: If none or several are set, or the value is no finite number in range.
    """

    target_speedup: float | None = None
    max_error: float | None = None
    min_psnr: float | None = None

    def __post_init__(self) -> None:
        given = self.to_dict()
        if len(given) != 1:
            got = " and ".join(map(option, sorted(given))) or "none"
            first, second, third = map(option, ("target_speedup", "max_error", "min_psnr"))
            raise ValueError(f"give one of {first}, {second} and {third}, got {got}")
        ((name, value),) = given.items()
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= _ABOVE[name]:
            raise ValueError(
                f"{option(name)} must be a finite number above {_ABOVE[name]:g}, got {value!r}"
            )
        if value > _MOST.get(name, math.inf):
            raise ValueError(
                f"{option(name)} must be at most {_MOST[name]:g}, what equal videos count as, got {value!r}"
            )

    def to_dict(self) -> dict[str, float]:
        """The one that is set, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def choose(self, problem: Problem, loss: float) -> Choice:
        """The best choice of the problem.

        Args:
            problem: The units, with what each of their candidates costs and spoils.
            loss: Largest loss, for `min_psnr`; the caller knows what it means in dB.

        Raises:
            ValueError: If the speed-up is out of reach.
        """
        if self.target_speedup is not None:
            choice = least_loss(problem, self.target_speedup)
            if choice is None:
                fastest = at_price(problem, 0.0)
                raise ValueError(
                    f"target_speedup {self.target_speedup:g} is out of reach on this device: the "
                    f"fastest plan forecasts {fastest.speedup:.2f}x; ask for less"
                )
            seconds = max(choice.seconds, problem.dense_seconds / self.target_speedup)
            return improve(problem, choice, seconds=seconds)
        if (limit := self.max_error) is not None:
            loss = limit**2 * problem.importance.sum().item()
        return improve(problem, cheapest(problem, lambda choice: choice.loss <= loss), loss=loss)


def shortfall(plan: Plan) -> str | None:
    """One line if a searched plan misses what was asked for: by how much, and what to do; else None.

    Args:
        plan: A plan as `search_plan` returns it.
    """
    measured, wanted = plan.measured, plan.provenance.get("objective", {})
    if measured.get("met") is not False:
        return None
    if "min_psnr" in wanted:
        return (
            f"not met: {wanted['min_psnr']:g} dB were asked for, the best of the plans that were tried "
            f"reaches {measured['psnr_db']:.1f} dB at a forecast of {plan.forecast['speedup']:.2f}x; it is "
            "kept. Ask for less, or give more calibration prompts"
        )
    if "target_speedup" in wanted:
        return (
            f"not met: {wanted['target_speedup']:g}x was asked for, the plan forecasts "
            f"{plan.forecast['speedup']:.2f}x, and {measured['speedup']:.2f}x was measured; it is kept. "
            "Measure again on a quiet machine, or ask for more than you need"
        )
    return None
