"""A plan's windows as an STA strategy, for one number of steps and one schedule."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ...patterns import Pattern
from ...plan import ComponentPlan, Plan, PlanError
from ...plan.component import DIFFUSION
from ...plan.errors import short
from .strategy import MAX_NUMBER, MAX_WINDOWS, Strategy
from .windows import Fitted, GridSize, density, fitted, tiles_of

# the sizes in tokens that SGLang 0.5.23 runs its kernel at
SGLANG_GRIDS = {(30, 48, 80), (36, 48, 48), (18, 48, 80)}


@dataclass(frozen=True)
class Exported:
    """A plan as an STA strategy, and what became of its heads, counted over steps, layers and heads.

    Attributes:
        strategy: What is written.
        grid: Frames, rows and columns of tokens that it is for.
        density: Computed pairs / all pairs of the strategy, over all steps.
        exact: Heads whose window computes what the plan says, and nothing else.
        widened: Heads whose window computes more.
        planned_dense: Heads that the plan itself leaves dense.
        lost: Sparse heads that became dense, by reason.
        notes: What else is to be known.
    """

    strategy: Strategy
    grid: GridSize
    density: float
    exact: int
    widened: int
    planned_dense: int
    lost: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """What became of the plan, in words."""
        steps, layers, heads = self.strategy.shape
        lines = [
            f"{steps} steps, {layers} layers, {heads} heads at {'x'.join(map(str, self.grid))} tokens: "
            f"density {self.density:.4f}",
            f"of {steps * layers * heads} heads {self.exact} have their window exactly, {self.widened} a "
            f"wider one, {self.planned_dense} are dense as planned, {sum(self.lost.values())} had to be "
            "made dense",
        ]
        lines += [f"made dense, {count} heads: {reason}" for reason, count in self.lost.items()]
        return [*lines, *self.notes]


def flow_sigmas(steps: int, shift: float) -> list[float]:
    """Noise levels of a flow-matching schedule: even steps from 1, shifted, as Wan and HunyuanVideo have.

    Args:
        steps: How many.
        shift: The schedule's `flow_shift`: `shift * s / (1 + (shift - 1) * s)`.

    Raises:
        ValueError: If the steps are none or too many to number, or the shift isn't a finite number above 0.
    """
    if not 1 <= steps <= MAX_NUMBER or not 0 < shift < math.inf:
        raise ValueError(
            f"steps must be from 1 to {MAX_NUMBER} and the shift > 0 and finite, got {steps} and {shift}"
        )
    even = [1 - n / steps for n in range(steps)]
    return [shift * s / (1 + (shift - 1) * s) for s in even]


def sigmas_of(plan: Plan, steps: int, shift: float | None) -> list[float]:
    """Noise levels of a plan's schedule in a number of steps, with the plan's own shift if none is given.

    Raises:
        ValueError: If there is no shift in the plan either, or what it has for noise levels is none.
    """
    schedule, settings = (plan.provenance.get(name) for name in ("schedule", "settings"))
    schedule = schedule if isinstance(schedule, dict) else {}
    known = schedule.get("sigmas")
    if shift is None and isinstance(known, list) and len(known) == steps:
        return [_noise_level(sigma) for sigma in known]
    if shift is None:
        shift = schedule.get("shift")
    if shift is None and isinstance(settings, dict):
        shift = settings.get("flow_shift")
    if isinstance(shift, bool) or not isinstance(shift, int | float):
        raise ValueError(
            "the plan doesn't say how its schedule is shifted: give --flow-shift, as the host's schedule has "
            "it (Wan 2.1: 3 at 480p, 5 at 720p; HunyuanVideo: 7)"
        )
    return flow_sigmas(steps, float(shift))


def _noise_level(found: object) -> float:
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= 1:
        raise ValueError(
            f"provenance.schedule.sigmas must be noise levels from 0 to 1, got {short(found)}; give "
            "--flow-shift instead"
        )
    return float(found)


def export_sta(
    plan: Plan,
    sigmas: Sequence[float],
    *,
    component: str | None = None,
    grid: GridSize | None = None,
) -> Exported:
    """A plan's windows as an STA strategy.

    A window that isn't made of whole 6x8x8 tiles becomes the smallest one that holds it. What no window can
    say (a far field, another shape, outputs kept from steps before) is made dense and counted.

    Args:
        plan: With windows (`"tile"`, `"window"`).
        sigmas: The noise level of each step, in order.
        component: Which of several transformers; a file is for one.
        grid: Frames, rows and columns of tokens; those of the plan's calibration if None.

    Raises:
        PlanError: If nothing sparse is left, or the plan's form or size has no place in such a file.
    """
    part = _component(plan, component)
    if grid is None:
        if part.layout.num_grid == 0:
            raise PlanError("the plan's layout must have a grid; pass the size in tokens")
        grid = part.layout.grid
    numbers, notes = _numbers(part)
    (num_heads,) = _same({num_heads for num_heads, _ in part.heads.values()})
    num_layers = max(numbers.values()) + 1  # names say it, so it may be anything
    if len(sigmas) * num_layers * num_heads > MAX_WINDOWS:
        raise PlanError(
            f"an STA strategy holds at most {MAX_WINDOWS} windows, got {len(sigmas)} steps of {num_layers} "
            f"layers, as the plan numbers them, and {num_heads} heads"
        )
    order: list[str | None] = [None] * num_layers
    for layer, number in numbers.items():
        order[number] = layer
    made: dict[tuple[int | None, ...], _Step] = {}
    steps, counts, lost, windows = [], Counter[str](), Counter[str](), Counter[GridSize]()
    for stages in (_stages(part, sigma) for sigma in sigmas):
        if stages not in made:
            made[stages] = _step(part, order, num_heads, stages, grid)
        step = made[stages]
        steps.append(step.windows)
        counts.update(step.counts)
        lost.update(step.lost)
        windows.update(window for layer in step.windows for window in layer)
    if not counts["exact"] + counts["widened"]:
        why = "; ".join(f"{count} heads: {reason}" for reason, count in lost.items())
        raise PlanError(
            "the plan must have windows that STA can say ('tile' and 'window' without far field), got "
            f"{why or 'dense heads alone'}; search with those patterns"
        )
    if grid not in SGLANG_GRIDS:
        notes.append(
            "SGLang runs STA at 30x48x80, 36x48x48 and 18x48x80 tokens alone: not at this size"
        )
    others = part.layout.num_global
    computed = sum(density(w, grid, others) * count for w, count in windows.items())
    return Exported(
        Strategy(tuple(steps)), grid, computed / windows.total(), counts["exact"], counts["widened"],
        counts["dense"], dict(lost.most_common()), tuple(notes),
    )  # fmt: skip


class _Step(NamedTuple):
    windows: tuple[tuple[GridSize, ...], ...]
    counts: Counter[str]
    lost: Counter[str]


def _step(
    part: ComponentPlan,
    order: Sequence[str | None],
    num_heads: int,
    stages: tuple[int | None, ...],
    grid: GridSize,
) -> _Step:
    """The windows of a step in which these stages apply, one for each branch of guidance."""
    whole, counts, lost, layers = tiles_of(grid), Counter[str](), Counter[str](), []
    for layer in order:
        heads = []
        for head in range(num_heads):
            said = _said(part, layer, stages, head)
            if not said or all(pattern.is_dense for pattern in said):
                counts["dense"] += 1
                heads.append(whole)
                continue
            found = _widest([fitted(pattern, grid) for pattern in said], whole)
            heads.append(found.window)
            if found.dense_because is not None:
                lost[found.dense_because] += 1
            else:
                counts["exact" if found.exact else "widened"] += 1
        layers.append(tuple(heads))
    return _Step(tuple(layers), counts, lost)


def _component(plan: Plan, name: str | None) -> ComponentPlan:
    if name is None and len(plan.components) == 1:
        (name,) = plan.components
    if name is None or name not in plan.components:
        raise PlanError(
            f"an STA strategy is for one transformer: component must be one of {sorted(plan.components)}, "
            f"got {name!r}"
        )
    part = plan.components[name]
    if part.kind != DIFFUSION:
        raise PlanError("an STA strategy is for video transformers, got a language model's plan")
    return part


def _same(found: set[int]) -> set[int]:
    if len(found) != 1:
        raise PlanError(
            f"an STA strategy has as many heads in each layer, got a plan with {sorted(found)}"
        )
    return found


def _numbers(part: ComponentPlan) -> tuple[dict[str, int], list[str]]:
    """Each layer's number in the file, and what was assumed to know it.

    Blocks of a second kind count on behind those of the first, as SGLang and sparsevideo number them.
    """
    kinds: dict[tuple[str, str], dict[str, int]] = {}
    for layer in part.layers:
        match = re.fullmatch(r"(.*?)(\d+)(.*)", layer)
        if match is None or len(match[2]) > 6:
            raise PlanError(
                f"a layer's path must hold its block's number, of at most six digits, got {short(layer)}"
            )
        kinds.setdefault((match[1], match[3]), {})[layer] = int(match[2])
    if len(kinds) > 2:
        raise PlanError(
            f"an STA strategy has one or two kinds of blocks, got {len(kinds)} in the plan's layers"
        )
    numbers: dict[str, int] = {}
    notes = []
    for found in sorted(kinds.values(), key=lambda found: next(iter(found)).startswith("single")):
        offset = max(numbers.values()) + 1 if numbers else 0
        if offset:
            notes.append(f"blocks of the second kind are numbered from {offset} on")
        numbers |= {layer: number + offset for layer, number in found.items()}
    notes.append(f"the file ends with layer {max(numbers.values())}, the last that the plan names")
    return numbers, notes


def _stages(part: ComponentPlan, sigma: float) -> tuple[int | None, ...]:
    """The stages that apply at a noise level: one, or one for each branch of guidance."""
    stage = part.stage(sigma)
    if stage is not None:
        return (stage,)
    return part.stage(sigma, "cond"), part.stage(sigma, "uncond")


def _said(
    part: ComponentPlan, layer: str | None, stages: Sequence[int | None], head: int
) -> list[Pattern]:
    """What the plan says of a head; nothing where it runs stock attention in a branch."""
    if layer is None or None in stages:
        return []
    said = part.layers[layer]
    return [said[stage][head].pattern for stage in stages if stage is not None]


def _widest(found: Sequence[Fitted], whole: GridSize) -> Fitted:
    """One window for all branches of guidance, which a strategy doesn't tell apart."""
    if len({f.window for f in found}) == 1:
        return found[0]._replace(exact=all(f.exact for f in found))
    for one in found:
        if one.window == whole:
            return Fitted(whole, False, one.dense_because or "dense in one branch of guidance")
    frames, rows, columns = (max(axis) for axis in zip(*(f.window for f in found), strict=True))
    return Fitted((frames, rows, columns), False)
