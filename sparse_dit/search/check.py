"""Whether a plan still suits a pipeline: heads' errors measured again, and those that left what was planned.

For a model that changed after its plan was made: a LoRA loaded, fine-tuned, another version.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..autocast import in_own_dtypes
from ..generation import Case, GenerationSettings, generate
from ..integrations.call import AttentionCall
from ..integrations.diffusers import (
    attach,
    attachment_of,
    components,
    heads_of,
    self_attention_layers,
)
from ..layout import TokenLayout
from ..on_cpu import on_cpu
from ..patterns import Pattern
from ..plan import ANY_CONFIG, ComponentPlan, Plan, PlanError, config_hash
from .cells import sample_rows
from .nested import Candidates
from .projection import projections
from .sampling import sampled_heads, whole_layout
from .side_by_side import one_thread
from .statistics import score_all

ROWS = 64
GROWTH = 1.5  # times the planned error that a head may have
FLOOR = 0.02  # and this much more, as small errors vary most
SURE = 2.0  # standard errors that it must be beyond that


@dataclass(frozen=True)
class CheckedHead:
    """A sparse head at a noise level.

    Args:
        component, layer, head, stage: Which.
        planned: Relative L2 error of its output that the plan expects.
        now: Measured on this pipeline.
        standard_error: Of `now`, from the spread over sampled rows.
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
        """Of the measured heads that left their error."""
        return len(self.left) / max(1, len(self.heads))


@dataclass
class _Totals:
    """Sums over sampled rows of one layer at one noise level, `[H]` each; see `statistics.score`."""

    error: Tensor
    square: Tensor
    norm: Tensor
    rows: int = 0

    def relative(self, head: int) -> tuple[float, float]:
        """Relative error of a head's output, and its standard error."""
        norm, rows = max(self.norm[head].item(), 1e-20), self.rows
        total, square = self.error[head].item(), self.square[head].item()
        spread = max(0.0, square - total**2 / rows) ** 0.5 / norm  # of the squared relative error
        now = (total / norm) ** 0.5
        return now, spread / (2 * now) if now else 0.0


@dataclass
class _Watch:
    """An intercept that scores the plan's pattern of each head on sampled rows; runs stock."""

    plan: ComponentPlan
    rows: int
    behind: dict[str, Tensor]
    found: dict[tuple[int, str], _Totals] = field(default_factory=dict)
    layout: TokenLayout | None = None
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __call__(self, call: AttentionCall) -> Tensor:
        context, layout = call.context, whole_layout(call)
        stage = self.plan.stage(context.sigma, context.branch)
        patterns = self.plan.patterns(call.layer, context.sigma, context.branch)
        if patterns is not None and stage is not None and layout is not None:
            self.layout = layout
            with one_thread():
                self._score(call, stage, patterns, layout)
        return call.stock()

    @in_own_dtypes
    def _score(
        self, call: AttentionCall, stage: int, patterns: tuple[Pattern, ...], layout: TokenLayout
    ) -> None:
        heads = len(patterns)
        fresh = _Totals(*(torch.zeros(heads, dtype=torch.float64) for _ in range(3)))
        totals = self.found.setdefault((stage, call.layer), fresh)
        rows = sample_rows(layout, self.rows, self.generator)
        totals.rows += len(rows) * call.q.shape[0]
        sparse = [head for head, pattern in enumerate(patterns) if not pattern.is_dense]
        behind = self.behind.get(call.layer)
        for head, sampled in sampled_heads(call, layout, rows, behind, sparse):
            error, square, _, norm = score_all(sampled, Candidates([patterns[head]]), layout)
            totals.error[head] += error[0]
            totals.square[head] += square[0]
            totals.norm[head] += norm


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
        plan: Made for it, or for what it was before it changed.
        case: What to generate; one of the calibration's cases compares best.
        settings: Size and steps; a few steps suffice.
        rows: Sampled query rows of each call.
        growth: Times the planned error that a head may have.

    Raises:
        ValueError: If the pipeline is patched, lacks layers or heads of the plan, or gives NaN.
        NotImplementedError: For patterns whose cells aren't whole tiles.
    """
    found, notes = components(pipe), []
    for name, part in plan.components.items():
        if name not in found:
            raise PlanError(f"the plan has a part for {name!r}, the pipeline has {sorted(found)}")
        notes += _notes(name, part, found[name])
    watches, attachments = {}, []
    behind = bool(plan.provenance.get("errors_behind_projection"))
    try:
        for name, part in plan.components.items():
            roots = projections(found[name], part.num_heads) if behind else {}
            watches[name] = _Watch(part, rows, roots)
            attachments.append(attach(found[name], watches[name], pipe))
        generate(pipe, case, settings)
    finally:
        for attachment in attachments:
            attachment.detach()
    heads, unseen = [], 0
    for name, watch in watches.items():
        if watch.layout and watch.layout.without_text() != watch.plan.layout.without_text():
            notes.append(
                f"{name}: measured at {watch.layout}, the plan was made at {watch.plan.layout}; "
                "errors differ with the size too"
            )
        for head in _compared(name, watch):
            heads += [head] if head else []
            unseen += head is None
    return Checked(tuple(heads), tuple(notes), unseen, growth)


def _compared(name: str, watch: _Watch) -> Iterator[CheckedHead | None]:
    """Each sparse head of the plan; None for one that can't be compared."""
    for layer, stages in watch.plan.layers.items():
        for stage, heads in enumerate(stages):
            totals = watch.found.get((stage, layer))
            for number, head in enumerate(heads):
                if head.pattern.is_dense:
                    continue
                if totals is None or head.error is None:
                    yield None
                    continue
                now, spread = totals.relative(number)
                if now != now:
                    raise ValueError(
                        f"{layer} head {number} gives NaN or Inf: the stock pipeline is broken at "
                        "this size or dtype"
                    )
                yield CheckedHead(name, layer, number, stage, head.error, now, spread)


def _notes(name: str, part: ComponentPlan, transformer: Any) -> list[str]:
    """How the model differs from the plan's, in words; PlanError where they can't be compared."""
    if attachment_of(transformer) is not None:
        raise ValueError(
            "the pipeline is patched; call handle.remove() or sparse_dit.unpatch(pipe)"
        )
    if any(pattern.cell is not None for pattern in part.distinct_patterns):
        raise NotImplementedError("a plan is checked for patterns of whole tiles only")
    config = transformer.config
    num_heads, head_dim = heads_of(transformer)
    kinds = [kind.__name__ for kind in type(transformer).__mro__]
    Plan("", {name: part}, 0.0).check_model(
        name,
        model_class=part.model_class if part.model_class in kinds else kinds[0],
        config_hash=part.config_hash,
        num_heads=num_heads,
        head_dim=head_dim,
        layer_names=self_attention_layers(transformer),
    )
    if part.config_hash in (ANY_CONFIG, config_hash(config)):
        return []
    return [
        f"{name}: its configuration isn't the one that the plan was made for, but layers and heads fit; "
        "set config_hash in the plan to use it"
    ]
