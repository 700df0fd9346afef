"""Indices over a grid that are found at some steps and kept for the steps between.

What was found is used again in the same run, stage and branch, for the same condition, at the same size, and
as long as the shape's `refresh` says; whatever else comes is found anew.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..autocast import lowered
from ..call import AttentionCall, StepContext, with_bias
from ..entry import PatternIndex
from ..index import SparseIndex, pattern_index
from ..layout import Tile, TokenLayout
from ..patterns import Mass, Pattern
from .blocks import blocks_of, token_orders
from .blockwise import Estimate, blockwise_entries, estimates_of
from .scores import mass_by_block, mass_stretch

_Key = tuple[str, str, int | None]  # layer, branch, condition


@dataclass(frozen=True, eq=False)
class Found:
    """What one call of a layer computes.

    Args:
        index: On the CPU.
        mass_block: If the call has to count the probability of stretches of keys: of so many; else None.
        learn: Takes what was counted, float32 `[B, H, P, S]`.
    """

    index: SparseIndex
    mass_block: int | None = None
    learn: Callable[[Tensor], None] | None = None


@dataclass(eq=False)
class _Kept:
    """What was found in one key's calls.

    Args:
        shape: What has to be the same for it to be used.
        index: Of all heads, as of the last step.
        entries: By head.
        steps: By head the step at which its entry was found; -1 if it doesn't hold for another.
        counts: By head how often its probability was counted.
        orders: By head the token order of its entry, where it has one of its own, and the entry's recall.
    """

    shape: tuple[object, ...]
    index: SparseIndex | None = None
    entries: dict[int, PatternIndex] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    counts: Counter[int] = field(default_factory=Counter)
    orders: dict[int, tuple[Tile, float]] = field(default_factory=dict)


class Estimates:
    """Indices of one transformer that are found in calls. A copy is empty.

    Args:
        tell: Called with what could not be done as planned.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._run = -1
        self._kept: dict[_Key, _Kept] = {}

    def forget(self) -> None:
        """Drop what is kept."""
        self._kept.clear()

    def find(
        self,
        call: AttentionCall,
        stage: int,
        patterns: Sequence[Pattern],
        shape: tuple[object, ...],
    ) -> Found:
        """What a call computes.

        Args:
            call: Of attention, whose layout is known.
            stage: Number of the plan's stage.
            patterns: One for each head; some are found in calls, others are geometry.
            shape: What has to be the same for what was found to be used again.
        """
        context = call.context
        if context.run != self._run:
            self.forget()
            self._run = context.run
        key = (call.layer, context.branch, context.condition)
        kept = self._kept.get(key)
        if (
            kept is None
            or kept.shape != shape
            or context.step < max(kept.steps.values(), default=0)
        ):
            kept = _Kept(shape)
            if context.step >= 0:
                self._kept[key] = kept
        due = [
            head
            for head, pattern in enumerate(patterns)
            if pattern.is_estimated and not _holds(kept, head, pattern, context)
        ]
        if not due and kept.index is not None:
            return Found(kept.index)
        return self._found(call, patterns, due, kept)

    def _found(
        self, call: AttentionCall, patterns: Sequence[Pattern], due: Sequence[int], kept: _Kept
    ) -> Found:
        layout, step = call.context.layout, call.context.step
        assert layout is not None, "else this call runs dense"
        for head, pattern in enumerate(patterns):
            if not pattern.is_estimated and head not in kept.entries:
                kept.entries[head] = pattern_index(pattern, layout)
        counted = [head for head in due if isinstance(patterns[head].shape, Mass)]
        told = {head: patterns[head] for head in due if head not in counted}
        if told:
            q, k, scale = _logits_of(call)
            self._keep(kept, blockwise_entries(q, k, told, layout, scale), step)
        if not counted:
            kept.index = _index_of(kept.entries, len(patterns))
            return Found(kept.index)
        ordered = {head: _counted_in(kept, head, patterns[head], layout) for head in counted}
        blocks = {head: blocks_of(pattern, layout) for head, pattern in ordered.items()}
        mass_block = math.gcd(*(mass_stretch(of) for of in set(blocks.values())))

        def learn(mass: Tensor) -> None:
            found = _of_mass(mass, ordered, layout, mass_block)
            kept.counts.update(counted)
            self._keep(kept, _best_orders(kept, found, ordered), step)
            kept.index = _index_of(kept.entries, len(patterns))

        now = kept.entries | {head: of.whole for head, of in blocks.items()}
        return Found(_index_of(now, len(patterns)), mass_block, learn)

    def _keep(self, kept: _Kept, found: Mapping[int, Estimate], step: int) -> None:
        kept.entries |= {head: estimate.entry for head, estimate in found.items()}
        kept.steps |= {head: step if estimate.sound else -1 for head, estimate in found.items()}
        if unsound := [str(head) for head, estimate in found.items() if not estimate.sound]:
            self._tell(
                "queries or keys that aren't finite: heads that have some are dense in such a call, first "
                f"head {unsound[0]}"
            )


def _counted_in(kept: _Kept, head: int, pattern: Pattern, layout: TokenLayout) -> Pattern:
    """The pattern in the token order in which a head's probability is counted next."""
    if not pattern.shape.own_order:
        return pattern
    orders, number = token_orders(layout), kept.counts[head]
    tile = orders[number] if number < len(orders) else kept.orders[head][0]
    return replace(pattern, tile=tile)


def _best_orders(
    kept: _Kept, found: Mapping[int, Estimate], ordered: Mapping[int, Pattern]
) -> dict[int, Estimate]:
    """What was found, without heads that have a better token order already; noted in `kept`."""
    better: dict[int, Estimate] = {}
    for head, estimate in found.items():
        tile, known = ordered[head].tile, kept.orders.get(head)
        if ordered[head].shape.own_order and estimate.sound:
            if known is not None and known[0] != tile and known[1] >= estimate.recall:
                better[head] = Estimate(kept.entries[head], True, known[1])
                continue
            kept.orders[head] = (tile, estimate.recall)
        better[head] = estimate
    return better


def _holds(kept: _Kept, head: int, pattern: Pattern, context: StepContext) -> bool:
    """Whether what was found for a head still holds."""
    found, shape = kept.steps.get(head, -1), pattern.shape
    if isinstance(shape, Mass) and (context.sigma or 0.0) > shape.dense_above:
        return False
    return found >= 0 and (shape.refresh is None or context.step - found < shape.refresh)


def _of_mass(
    mass: Tensor, patterns: Mapping[int, Pattern], layout: TokenLayout, mass_block: int
) -> dict[int, Estimate]:
    """What heads see whose mass was counted."""
    found: dict[int, Estimate] = {}
    for pattern in dict.fromkeys(patterns.values()):
        mine = [head for head, of in patterns.items() if of == pattern]
        blocks = blocks_of(pattern, layout)
        p = mass_by_block(mass[:, mine], blocks, mass_block).mean(0)
        found |= zip(mine, estimates_of(p, None, pattern.shape, blocks), strict=True)
    return found


def _index_of(entries: dict[int, PatternIndex], heads: int) -> SparseIndex:
    """The index of heads' entries; those that share one share it in the index too."""
    distinct = list({id(entries[head]): entries[head] for head in range(heads)}.values())
    places = {id(entry): place for place, entry in enumerate(distinct)}
    return SparseIndex(tuple(distinct), tuple(places[id(entries[head])] for head in range(heads)))


def _logits_of(call: AttentionCall) -> tuple[Tensor, Tensor, float]:
    """q and k `[B, H, N, D]` and the factor that make the call's logits."""
    q, k = lowered(call.q, call.k)
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    if call.bias is not None:
        q, k, _ = with_bias(q, k, k, call.bias, scale)
    return q.transpose(1, 2), k.transpose(1, 2), scale
