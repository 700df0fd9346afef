"""Indices over a grid that are found at some steps and kept for the steps between.

What was found is used again in the same run, stage and branch, for the same condition, at the same size, and
as long as the shape's `refresh` says; whatever else comes is found anew. A head's own token order holds for
the whole run.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..autocast import lowered
from ..call import AttentionCall, StepContext, with_bias
from ..cut import slice_entry
from ..entry import PatternIndex
from ..index import SparseIndex, dense_entry, index_of, pattern_index
from ..layout import TokenLayout
from ..patterns import Mass, Pattern
from .blocks import blocks_of, sampled_entry
from .blockwise import Estimate, blockwise_entries, estimates_of
from .orders import SAMPLED, Order, best_orders, stride_of
from .scores import mass_by_block, mass_stretch

TURNS = 4  # generations of a diffusion language model whose indices are kept

_Key = tuple[str, str, int | None]  # layer, branch, condition


@dataclass(frozen=True, eq=False)
class Found:
    """What one call of a layer computes.

    Args:
        index: On the CPU.
        mass_block: If the call has to count the probability of stretches of keys: of so many; else None.
        learn: If not None, takes the call's output `[B, N, H, D]`, and what was counted, float32
            `[B, H, P, S]`.
    """

    index: SparseIndex
    mass_block: int | None = None
    learn: Callable[[Tensor, Tensor | None], None] | None = None


@dataclass(eq=False)
class _Kept:
    """What was found in one key's calls.

    Args:
        shape: What has to be the same for it to be used.
        index: Of all heads, as of the last step.
        entries: By head.
        steps: By head the step at which its entry was found; -1 if it doesn't hold for another.
    """

    shape: tuple[object, ...]
    index: SparseIndex | None = None
    entries: dict[int, PatternIndex] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)


@dataclass(eq=False)
class _Orders:
    """The token orders of one layer's heads.

    Args:
        layout: Where they hold.
        of: By head.
        dense: At how many steps there were dense calls.
        step: The last one of them.
    """

    layout: TokenLayout
    of: dict[int, Order] = field(default_factory=dict)
    dense: int = 0
    step: int = -1


@dataclass(eq=False)
class _Run:
    """What is kept of one generation.

    Args:
        kept: By layer, branch and condition.
        orders: By layer: both branches of guidance have the same.
    """

    kept: dict[_Key, _Kept] = field(default_factory=dict)
    orders: dict[str, _Orders] = field(default_factory=dict)


class _Operands(NamedTuple):
    """What makes a call's logits, `[B, H, N, D]`, and the factor."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


class Estimates:
    """Indices of one transformer that are found in calls. A copy is empty.

    Args:
        tell: Called with what could not be done as planned.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._runs: dict[int, _Run] = {}  # the last one used is the last

    def forget(self) -> None:
        """Drop what is kept."""
        with self._lock:
            self._runs.clear()

    @property
    def num_bytes(self) -> int:
        """Memory of the indices that are kept."""
        entries = {
            id(entry): entry
            for run in self._runs.values()
            for kept in run.kept.values()
            for entry in kept.entries.values()
        }
        return sum(_num_bytes(entry) for entry in entries.values())

    def _run_of(self, context: StepContext) -> _Run:
        """What is kept of a call's generation; canvases may take turns, others follow each other."""
        with self._lock:
            run = self._runs.pop(context.run, None) or _Run()
            others = [*self._runs][1 - TURNS :] if context.active else []
            self._runs = {number: self._runs[number] for number in others}
            self._runs[context.run] = run
            return run

    def find(
        self, call: AttentionCall, patterns: Sequence[Pattern], shape: tuple[object, ...]
    ) -> Found:
        """What a call computes.

        Args:
            call: Of attention, whose layout is known.
            patterns: One for each head; some are found in calls, others are geometry.
            shape: What has to be the same for what was found to be used again, the plan's stage with it.
        """
        context, layout = call.context, call.context.layout
        assert layout is not None, "else this call runs dense"
        run = self._run_of(context)
        key = (call.layer, context.branch, context.condition)
        kept, orders = run.kept.get(key), run.orders.get(call.layer)
        if orders is None or orders.layout != layout:
            orders = run.orders[call.layer] = _Orders(layout)
        last = -1 if kept is None else max(kept.steps.values(), default=-1)
        if kept is None or kept.shape != shape or context.step < last:
            kept = run.kept[key] = _Kept(shape)
        due = [
            head
            for head, pattern in enumerate(patterns)
            if pattern.is_estimated and not _holds(kept, head, pattern, context)
        ]
        if not due and kept.index is not None:
            return Found(kept.index)
        return self._found(call, layout, patterns, due, kept, orders)

    def _found(
        self,
        call: AttentionCall,
        layout: TokenLayout,
        patterns: Sequence[Pattern],
        due: Sequence[int],
        kept: _Kept,
        orders: _Orders,
    ) -> Found:
        step, n, rows = call.context.step, layout.seq_len, call.q.shape[1]
        active = call.context.active
        for head, pattern in enumerate(patterns):
            if not pattern.is_estimated and head not in kept.entries:
                kept.entries[head] = pattern_index(pattern, layout)
        counted = {head: patterns[head] for head in due if isinstance(patterns[head].shape, Mass)}
        told = {head: patterns[head] for head in due if head not in counted}
        dense = [head for head, pattern in told.items() if _is_dense_at(pattern, call.context)]
        found = {head: Estimate(dense_entry(n, n), True, 1.0) for head in dense}
        estimated = {head: orders.of.get(head, of.tile) for head, of in told.items()}
        ordered: dict[int, Pattern] = {}
        for head, order in estimated.items():
            if head in found:
                continue
            if order is SAMPLED:
                entry = sampled_entry(layout, stride_of(told[head], layout))
                found[head] = Estimate(entry, True, math.nan)
            else:
                ordered[head] = replace(told[head], tile=order)
        if ordered:
            q, k, _, scale = _operands(call)
            more = {"active": active, "valid": _valid(call)}
            found |= blockwise_entries(q, k, ordered, layout, scale, **more)
        self._keep(kept, found, step)
        kept.steps |= dict.fromkeys(dense, -1)
        tried = {head: told[head] for head in dense if told[head].shape.own_order}
        if not _tries(orders, tried, step):
            tried = {}
        blocks = {head: blocks_of(pattern, layout) for head, pattern in counted.items()}
        mass_block = math.gcd(*map(mass_stretch, set(blocks.values()))) if counted else None

        def learn(out: Tensor, mass: Tensor | None) -> None:
            if tried:
                q, k, v, scale = _operands(call)
                out = out.transpose(1, 2)
                best = best_orders(q, k, v, out, tried, layout, scale)
                orders.of |= {head: order for head, (order, _) in best.items()}
            if mass is not None and mass_block is not None:
                self._keep(kept, _of_mass(mass, counted, layout, mass_block, rows, active), step)
                kept.index = _index_of(kept.entries, rows)

        now = kept.entries | {head: of.whole for head, of in blocks.items()}
        index = _index_of(now, rows)
        if not counted:
            kept.index = index
        return Found(index, mass_block, learn if tried or counted else None)

    def _keep(self, kept: _Kept, found: Mapping[int, Estimate], step: int) -> None:
        kept.entries |= {head: estimate.entry for head, estimate in found.items()}
        kept.steps |= {head: step if estimate.sound else -1 for head, estimate in found.items()}
        if not all(estimate.sound for estimate in found.values()):
            self._tell(
                "queries or keys that aren't finite: heads with some are dense in such calls"
            )


def _num_bytes(entry: PatternIndex) -> int:
    far = entry.far
    parts = [entry.q_order, entry.k_order, entry.q_offsets, entry.run_offsets, entry.runs]
    parts += [] if far is None else [far.cell_offsets, far.run_offsets, far.runs]
    return sum(x.numel() * x.element_size() for x in parts if x is not None)


def _holds(kept: _Kept, head: int, pattern: Pattern, context: StepContext) -> bool:
    """Whether what was found for a head still holds."""
    found, refresh = kept.steps.get(head, -1), pattern.shape.refresh
    if _is_dense_at(pattern, context):
        return False
    return found >= 0 and (refresh is None or context.step - found < refresh)


def _is_dense_at(pattern: Pattern, context: StepContext) -> bool:
    return (context.sigma or 0.0) > getattr(pattern.shape, "dense_above", 1.0)


def _tries(orders: _Orders, heads: Mapping[int, Pattern], step: int) -> bool:
    """Whether orders are tried in a dense call: the first of the first, third, seventh, ... dense step."""
    if heads and step != orders.step:
        orders.dense, orders.step = orders.dense + 1, step
        return orders.dense & (orders.dense + 1) == 0
    return False


def _index_of(entries: Mapping[int, PatternIndex], rows: int) -> SparseIndex:
    """The index of all heads; of the last `rows` tokens, where entries are of all."""
    cut: dict[int, PatternIndex] = {}  # entries that heads share stay one
    for entry in entries.values():
        n = entry.num_queries
        if id(entry) not in cut:
            cut[id(entry)] = entry if n == rows else slice_entry(entry, n - rows, n)
    return index_of({head: cut[id(entry)] for head, entry in entries.items()})


def _valid(call: AttentionCall) -> tuple[int, int] | None:
    """The keys from the first to the last that some row may see; None for all."""
    if not call.context.active or call.rows is None:
        return None
    first, last = call.rows.valid(call.k.shape[1], call.q.shape[1])[0].tolist()
    return first, last


def _of_mass(
    mass: Tensor,
    patterns: Mapping[int, Pattern],
    layout: TokenLayout,
    mass_block: int,
    rows: int,
    active: int,
) -> dict[int, Estimate]:
    """What heads see whose mass was counted, in calls of the last `rows` tokens."""
    found: dict[int, Estimate] = {}
    for pattern in dict.fromkeys(patterns.values()):
        mine = [head for head, of in patterns.items() if of == pattern]
        blocks = blocks_of(pattern, layout)
        counted = mass[:, mine]
        if rows < layout.seq_len:
            missing = len(blocks.groups.owner) - counted.shape[2]
            counted = torch.nn.functional.pad(counted, (0, 0, missing, 0))
        p = mass_by_block(counted, blocks, mass_block).mean(0)
        if rows < layout.seq_len:
            p = p[:, blocks.first_of(rows) :]
        estimates = estimates_of(p, None, pattern.shape, blocks, active=active)
        found |= zip(mine, estimates, strict=True)
    return found


def _operands(call: AttentionCall) -> _Operands:
    q, k, v = lowered(call.q, call.k, call.v)
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    if call.bias is not None:
        q, k, _ = with_bias(q, k, k, call.bias, scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _Operands(q, k, v, scale)
