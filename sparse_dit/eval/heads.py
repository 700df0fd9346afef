"""Every head's error and attention recall under a plan, on a prompt that the search has not seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..autocast import in_own_dtypes
from ..generation import Case, GenerationSettings, generate
from ..integrations.call import AttentionCall
from ..integrations.diffusers import attach, components
from ..layout import TokenLayout
from ..on_cpu import on_cpu
from ..patterns import Pattern
from ..plan import ComponentPlan, Plan
from ..search.cells import cell_table, sample_rows
from ..search.nested import kind_of
from ..search.sampling import sampled_heads, whole_layout
from ..search.seen import seen_tiles

ROWS = 48


@dataclass
class HeadTotals:
    """Sums over sampled rows of one layer in one stage, `[H]` each.

    Attributes:
        error: Squared error of the output.
        norm: Squared output.
        mass: Attention mass computed exactly.
        rows: Number of rows.
    """

    error: Tensor
    norm: Tensor
    mass: Tensor
    rows: int = 0

    @property
    def relative_error(self) -> list[float]:
        """Relative L2 error of each head's output."""
        return (self.error / self.norm.clamp_min(1e-20)).sqrt().tolist()

    @property
    def recall(self) -> list[float]:
        """Share of each head's attention mass that is computed exactly."""
        return (self.mass / max(1, self.rows)).tolist()


# (stage, layer) -> totals
HeadQuality = dict[tuple[int, str], HeadTotals]


@dataclass
class _Watch:
    """An intercept that compares sampled rows with what the plan would compute; runs stock."""

    plan: ComponentPlan
    found: HeadQuality = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __call__(self, call: AttentionCall) -> Tensor:
        context, layout = call.context, whole_layout(call)
        stage = self.plan.stage(context.sigma, context.branch)
        patterns = self.plan.patterns(call.layer, context.sigma, context.branch)
        if patterns and layout is not None and stage is not None:
            self._add(call, layout, stage, patterns)
        return call.stock()

    @in_own_dtypes
    def _add(
        self, call: AttentionCall, layout: TokenLayout, stage: int, patterns: tuple[Pattern, ...]
    ) -> None:
        heads = len(patterns)
        error, norm, mass = (torch.zeros(heads, dtype=torch.float32) for _ in range(3))
        totals = self.found.setdefault((stage, call.layer), HeadTotals(error, norm, mass))
        rows = sample_rows(layout, ROWS, self.generator)
        totals.rows += len(rows) * call.q.shape[0]
        for head, sampled in sampled_heads(call, layout, rows, None):
            pattern = patterns[head]
            tile, pool = ((4, 4, 4), None) if pattern.is_dense else kind_of(pattern).cells
            sums = sampled.by_cells(cell_table(layout, tile), pool)
            totals.norm[head] += sums.out.square().sum()
            if pattern.is_dense:
                totals.mass[head] += len(rows)
                continue
            seen = seen_tiles(pattern, layout)[sums.cell]
            out = sums.outputs(seen[None], pattern.far)[0]
            totals.error[head] += (out - sums.out).square().sum()
            totals.mass[head] += (seen * sums.mass).sum() + sums.text_mass.sum()


@on_cpu
def head_quality(
    pipe: Any, plan: Plan, case: Case, settings: GenerationSettings
) -> dict[str, HeadQuality]:
    """Run the stock pipeline once and evaluate sampled rows of every head that the plan names.

    Args:
        pipe: A stock pipeline; stock again on return.
        plan: What is evaluated; patterns with cells smaller than a tile are not supported.
        case: Prompt and seed.
        settings: Size and steps.

    Returns:
        For each component the totals of each (stage, layer) that the run came through.

    Raises:
        NotImplementedError: If a pattern's cells are not whole tiles.
    """
    watches, attachments = {}, []
    for part in plan.components.values():
        if any(p.cell is not None for p in part.distinct_patterns):
            raise NotImplementedError("error and recall are measured for whole tiles only")
    try:
        for name, part in plan.components.items():
            watches[name] = _Watch(part)
            attachments.append(attach(components(pipe)[name], watches[name], pipe))
        generate(pipe, case, settings)
    finally:
        for attachment in attachments:
            attachment.detach()
    return {name: watch.found for name, watch in watches.items()}
