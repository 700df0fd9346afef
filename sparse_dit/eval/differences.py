"""How a plan differs from another one, for the report: counted by noise level, and line by line."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..patterns import Pattern
from ..plan import ComponentPlan, Plan, diff

STOCK = "stock"  # where a plan has no stage or no such layer


@dataclass(frozen=True)
class Range:
    """Heads in a range of noise levels in which neither plan changes its stage.

    Attributes:
        component: The transformer's name in the pipeline.
        sigma: The bounds as text, with the branch of guidance if either plan tells them apart.
        heads: How many heads there are in all layers that either plan names.
        same: How many heads have equal patterns.
        parameters: How many heads have patterns that differ in parameters alone.
        moves: The other heads: the kind of pattern in the other plan and in this one, and how many there are.
    """

    component: str
    sigma: str
    heads: int
    same: int
    parameters: int
    moves: dict[tuple[str, str], int]


@dataclass(frozen=True)
class Difference:
    """A plan against another one.

    Attributes:
        name: The other plan's name.
        other, plan: The other plan, and the one that the report is about.
        ranges: Counts by noise level.
        lines: What changed from the other plan to this one, see `plan.diff`.
    """

    name: str
    other: Plan
    plan: Plan
    ranges: list[Range]
    lines: list[str]

    @property
    def facts(self) -> list[tuple[str, str, str]]:
        """Name, the other plan's value and this plan's, as text."""
        rows = [("density", f"{self.other.density:.3f}", f"{self.plan.density:.3f}")]
        for note, keys in (
            ("forecast", ("speedup", "error")),
            ("measured", ("psnr_db", "speedup")),
        ):
            for key in keys:
                values = [getattr(plan, note).get(key) for plan in (self.other, self.plan)]
                if any(value is not None for value in values):
                    one, two = ("-" if v is None else f"{v}" for v in values)
                    rows.append((f"{key}, {note}", one, two))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        ranges = [
            {
                "component": r.component,
                "sigma": r.sigma,
                "heads": r.heads,
                "same": r.same,
                "other_parameters": r.parameters,
                "moves": [[*move, count] for move, count in r.moves.items()],
            }
            for r in self.ranges
        ]
        return {"against": self.name, "ranges": ranges, "lines": self.lines}


def difference(name: str, other: Plan, plan: Plan) -> Difference:
    """What changed from `other`, called `name`, to `plan`."""
    shared = [part for part in plan.components if part in other.components]
    ranges = [
        found
        for part in shared
        for found in _ranges(part, other.components[part], plan.components[part])
    ]
    return Difference(name, other, plan, ranges, diff(other, plan))


def _ranges(name: str, old: ComponentPlan, new: ComponentPlan) -> list[Range]:
    stages = [*old.stages, *new.stages]
    edges = sorted({0.0, 1.0, *(e for s in stages for e in (s.progress_max, s.progress_min))})
    told_apart = any(stage.branch != "any" for stage in stages)
    branches = ("cond", "uncond") if told_apart else ("any",)
    layers = list(dict.fromkeys([*old.layers, *new.layers]))
    ranges = []
    for low, high in reversed(list(itertools.pairwise(edges))):
        middle = (low + high) / 2
        for branch in branches:
            if old.stage(middle, branch) is None and new.stage(middle, branch) is None:
                continue
            text = f"{high:.4g} to {low:.4g}" + (f", {branch}" if told_apart else "")
            pairs = [pair for layer in layers for pair in _pairs(old, new, layer, middle, branch)]
            ranges.append(_counted(name, text, pairs))
    return ranges


def _pairs(
    old: ComponentPlan, new: ComponentPlan, layer: str, progress: float, branch: str
) -> Iterator[tuple[Pattern | None, Pattern | None]]:
    """Each head's patterns in both plans; None where stock attention runs."""
    num_heads, _ = old.heads.get(layer) or new.heads[layer]
    stock = (None,) * num_heads
    return zip(*(p.patterns(layer, progress, branch) or stock for p in (old, new)), strict=False)


def _counted(name: str, sigma: str, pairs: list[tuple[Pattern | None, Pattern | None]]) -> Range:
    same = sum(a == b for a, b in pairs)
    changed = [(kind_of(a), kind_of(b)) for a, b in pairs if a != b]
    moves = Counter(pair for pair in changed if pair[0] != pair[1])
    return Range(
        name, sigma, len(pairs), same, len(changed) - moves.total(), dict(moves.most_common())
    )


def kind_of(pattern: Pattern | None) -> str:
    """Shape's name, with "+far" where there is a far field."""
    if pattern is None:
        return STOCK
    return pattern.name + ("+far" if pattern.far else "")
