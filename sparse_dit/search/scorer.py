"""How far patterns move the outputs of heads, measured on sampled rows of what a pipeline computes.

There is one definition. A row's error is the L2 norm of the change that the pattern makes to the head's
output behind the layer's output projection (see `projection`), or to the output itself where a layer has no
projection of its own. A head's relative error is the root of their summed squares over the exact outputs'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..autocast import in_own_dtypes
from ..call import AttentionCall
from ..layout import TokenLayout
from ..patterns import Pattern
from ..plan import ComponentPlan, Plan
from .cells import sample_rows
from .nested import Candidates
from .projection import projections
from .sampling import one_thread, sampled_heads, whole_layout
from .statistics import score_all

Key = tuple[int, str]  # number of a stage or noise level, and layer
Asked = tuple[Key, Sequence[Sequence[Pattern]]]


@dataclass(eq=False)
class Scored:
    """Sums over the sampled rows of one layer at one noise level; H heads, K patterns each.

    Attributes:
        error: float64 `[H, K]`, squared errors.
        error_squared: float64 `[H, K]`, squares of the rows' squared errors.
        mass: float64 `[H, K]`, attention mass that is computed exactly.
        norm: float64 `[H]`, squared exact outputs; 0 for a head all of whose patterns are dense.
        rows: Number of rows.
    """

    error: Tensor
    error_squared: Tensor
    mass: Tensor
    norm: Tensor
    rows: int = 0

    @staticmethod
    def empty(heads: int, patterns: int) -> Scored:
        """Nothing yet."""
        error, squared, mass = (torch.zeros(heads, patterns, dtype=torch.float64) for _ in range(3))
        return Scored(error, squared, mass, torch.zeros(heads, dtype=torch.float64))

    @property
    def squared_error(self) -> Tensor:
        """Squared relative errors, float64 `[H, K]`."""
        return self.error / self.norm[:, None].clamp_min(1e-20)

    @property
    def relative_error(self) -> Tensor:
        """Relative errors, float64 `[H, K]`."""
        return self.squared_error.sqrt()

    @property
    def standard_error(self) -> Tensor:
        """One standard error of `relative_error` from the spread over rows, float64 `[H, K]`."""
        variance = (self.error_squared - self.error.square() / max(1, self.rows)).clamp_min(0)
        spread = variance.sqrt() / self.norm[:, None].clamp_min(1e-20)
        now = self.relative_error
        return torch.where(now > 0, spread / (2 * now), 0.0)

    @property
    def recall(self) -> Tensor:
        """Share of the attention mass that is computed exactly, float64 `[H, K]`."""
        return self.mass / max(1, self.rows)


class PatternScorer:
    """An intercept that measures patterns on sampled rows of attention calls and returns stock outputs.

    Args:
        ask: Says what is measured of a call over all tokens of its layout: the key to sum under, and the
            patterns of each of the H heads, equally many. It gives None for a call that isn't measured.
        roots: For each layer what the heads' values are multiplied by, `[H, D, D]`; see `projections`.
        rows: How many query rows of each call are sampled.
        seed: The seed by which rows are sampled.

    Attributes:
        found: The sums over the measured calls, by key.
        layout: The token layout of the last call that was measured; None before the first.
    """

    def __init__(
        self,
        ask: Callable[[AttentionCall], Asked | None],
        roots: Mapping[str, Tensor],
        rows: int,
        seed: int = 0,
    ) -> None:
        self.ask, self.roots, self.rows = ask, roots, rows
        self.generator = torch.Generator().manual_seed(seed)
        self.found: dict[Key, Scored] = {}
        self.layout: TokenLayout | None = None

    def __call__(self, call: AttentionCall) -> Tensor:
        layout = whole_layout(call)
        asked = self.ask(call) if layout is not None else None
        if layout is not None and asked is not None:
            self.layout = layout
            with one_thread():
                self._score(call, layout, *asked)
        return call.stock()

    @in_own_dtypes
    def _score(
        self,
        call: AttentionCall,
        layout: TokenLayout,
        key: Key,
        patterns: Sequence[Sequence[Pattern]],
    ) -> None:
        total = self.found.setdefault(key, Scored.empty(len(patterns), len(patterns[0])))
        rows = sample_rows(layout, self.rows, self.generator)
        total.rows += len(rows) * call.q.shape[0]
        dense = [all(p.is_dense for p in listed) for listed in patterns]
        total.mass[torch.tensor(dense)] += len(rows) * call.q.shape[0]
        sparse = [head for head, is_dense in enumerate(dense) if not is_dense]
        for head, sampled in sampled_heads(call, layout, rows, self.roots.get(call.layer), sparse):
            error, square, mass, norm = score_all(sampled, Candidates(patterns[head]), layout)
            total.error[head] += error
            total.error_squared[head] += square
            total.mass[head] += mass
            total.norm[head] += norm


def plan_scorer(
    plan: Plan, component: str, transformer: nn.Module, rows: int, seed: int = 0
) -> PatternScorer:
    """A scorer of a plan's patterns, by stage and layer, that measures errors as the plan's were measured.

    Args:
        plan: Its patterns must have whole tiles as cells. Errors are of the heads' own outputs, as in early
            plans, unless its provenance has `errors_behind_projection`.
        component: Name of the transformer in the plan.
        transformer: The transformer itself, which has the output projections.
        rows, seed: See `PatternScorer`.

    Raises:
        NotImplementedError: If a pattern has smaller cells.
    """
    part: ComponentPlan = plan.components[component]
    if any(pattern.cell is not None for pattern in part.distinct_patterns):
        raise NotImplementedError(
            "heads' errors are measured for patterns of whole tiles only, and this plan has smaller cells"
        )

    def ask(call: AttentionCall) -> Asked | None:
        context = call.context
        stage = part.stage(context.sigma, context.branch)
        patterns = part.patterns(call.layer, context.sigma, context.branch)
        if stage is None or patterns is None:
            return None
        return (stage, call.layer), [[pattern] for pattern in patterns]

    projected = bool(plan.provenance.get("errors_behind_projection"))
    return PatternScorer(ask, projections(transformer) if projected else {}, rows, seed)
