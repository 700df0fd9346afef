"""Whether a plan still suits a pipeline: heads' errors measured again, and those that left what was planned.

For a model that changed after its plan was made: a LoRA loaded, fine-tuned, another version.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..generation import Case, GenerationSettings
from ..integrations import attached, unpatched, workload
from ..on_cpu import on_cpu
from ..patch import check_fits
from ..plan import ANY_CONFIG, ComponentPlan, Plan, PlanError, config_hash
from .scorer import PatternScorer, plan_scorer

ROWS = 64
GROWTH = 1.5  # times the planned error that a head may have
FLOOR = 0.02  # and this much more, as small errors vary most
SURE = 2.0  # standard errors that it must be beyond that


@dataclass(frozen=True)
class CheckedHead:
    """A sparse head at a noise level.

    Args:
        component, layer, head, stage: The transformer, layer, head and stage of the plan.
        planned: The relative L2 error that the plan expects of the head; see `HeadChoice.error`.
        now: The same error, measured on this pipeline.
        standard_error: The standard error of `now`, from the spread over sampled rows.
    """

    component: str
    layer: str
    head: int
    stage: int
    planned: float
    now: float
    standard_error: float

    def left(self, growth: float = GROWTH) -> bool:
        """Whether its error is larger than planned, beyond what sampling explains."""
        return self.now - SURE * self.standard_error > self.planned * growth + FLOOR


@dataclass(frozen=True)
class Checked:
    """What `check_plan` found.

    Args:
        heads: Sparse heads that were measured.
        notes: In which way the pipeline or the size isn't that of the plan, a sentence each.
        unseen: Sparse heads at noise levels that no step fell into, or without a planned error.
        growth: Times the planned error that a head may have.
    """

    heads: tuple[CheckedHead, ...]
    notes: tuple[str, ...]
    unseen: int
    growth: float = GROWTH

    @property
    def left(self) -> tuple[CheckedHead, ...]:
        """Heads that left their error, the worst first."""
        found = [head for head in self.heads if head.left(self.growth)]
        return tuple(sorted(found, key=lambda head: head.planned - head.now))

    @property
    def share(self) -> float:
        """The share of the measured heads whose error is larger than planned; see `left`."""
        return len(self.left) / max(1, len(self.heads))


@on_cpu
def check_plan(
    pipe: Any,
    plan: Plan,
    case: Case,
    settings: GenerationSettings,
    *,
    rows: int = ROWS,
    growth: float = GROWTH,
) -> Checked:
    """Run the stock pipeline once and compare every sparse head's error with what the plan expects.

    Args:
        pipe: A pipeline of the plan's class, not patched; left as it was.
        plan: A plan made for the pipeline, or for what it was before it changed.
        case: What to generate; one of the calibration's cases compares best.
        settings: Size and steps; a few steps suffice.
        rows: Sampled query rows of each call.
        growth: Times the planned error that a head may have.

    Raises:
        ValueError: If the pipeline is patched, lacks layers or heads of the plan, or gives NaN.
        NotImplementedError: For patterns whose cells aren't whole tiles.
    """
    found, notes = unpatched(pipe), []
    for name, part in plan.components.items():
        if name not in found:
            raise PlanError(f"the plan has a part for {name!r}, the pipeline has {sorted(found)}")
        notes += _notes(name, part, found[name])
    scorers = {name: plan_scorer(plan, name, found[name], rows) for name in plan.components}
    with attached(pipe, scorers):
        workload(pipe, settings).run(case)
    heads, unseen = [], 0
    for name, scorer in scorers.items():
        part, layout = plan.components[name], scorer.layout
        if layout and layout.without_global() != part.layout.without_global():
            notes.append(
                f"{name}: measured at {layout}, the plan was made at {part.layout}; "
                "errors differ with the size too"
            )
        for head in _compared(name, part, scorer):
            heads += [head] if head else []
            unseen += head is None
    return Checked(tuple(heads), tuple(notes), unseen, growth)


def _compared(
    name: str, part: ComponentPlan, scorer: PatternScorer
) -> Iterator[CheckedHead | None]:
    """Each sparse head of the plan; None for one that can't be compared."""
    for layer, stages in part.layers.items():
        for stage, heads in enumerate(stages):
            scored = scorer.found.get((stage, layer))
            for number, head in enumerate(heads):
                if head.pattern.is_dense:
                    continue
                if scored is None or head.error is None:
                    yield None
                    continue
                now, spread = (
                    x[number, 0].item() for x in (scored.relative_error, scored.standard_error)
                )
                if now != now:
                    raise ValueError(
                        f"{layer} head {number} gives NaN or Inf: the stock pipeline is broken at "
                        "this size or dtype"
                    )
                yield CheckedHead(name, layer, number, stage, head.error, now, spread)


def _notes(name: str, part: ComponentPlan, transformer: Any) -> list[str]:
    """How the model differs from the plan's, in words; PlanError where they can't be compared."""
    other = replace(part, config_hash=ANY_CONFIG)
    check_fits(Plan("", {name: other}, 0.0), name, transformer)
    if part.config_hash in (ANY_CONFIG, config_hash(transformer.config)):
        return []
    return [
        f"{name}: its configuration isn't the one that the plan was made for, but layers and heads fit; "
        "set config_hash in the plan to use it"
    ]
