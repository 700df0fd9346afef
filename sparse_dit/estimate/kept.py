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
from ..backends.triton.chosen import ChosenIndex
from ..call import AttentionCall, StepContext, with_bias
from ..index import SparseIndex, dense_entry, pattern_index
from ..layout import TokenLayout
from ..patterns import Cluster, Mass, Pattern
from .blocks import blocks_of, sampled_entry
from .blockwise import Estimate, blockwise_entries, estimates_of
from .clusters import Centroids, cluster_entries
from .joined import Seen, joined, num_bytes
from .on_device import Found as OnDevice
from .on_device import blocks_of_mass, blocks_on_device, sees_all, takes
from .orders import SAMPLED, Order, best_orders, stride_of
from .scores import mass_by_block, mass_stretch

LAID = 4096  # tokens up to which what is laid out is kept: it takes less than 2 % of k and v there
NOT_FINITE = "queries or keys that aren't finite: heads with some are dense in such calls"
TURNS = 4  # generations of a diffusion language model whose indices are kept

_Key = tuple[str, str, int | None]  # layer, branch, condition


@dataclass(frozen=True, eq=False)
class Found:
    """What one call of a layer computes.

    Args:
        index: On the CPU; or what was chosen on the call's device, for the Triton backend.
        mass_block: If the call has to count the probability of stretches of keys: of so many; else None.
        learn: Takes what was counted, float32 `[B, H, P, S]`; None if nothing is.
    """

    index: SparseIndex | ChosenIndex
    mass_block: int | None = None
    learn: Callable[[Tensor], None] | None = None


@dataclass(eq=False)
class _Kept:
    """What was found in one key's calls.

    Args:
        shape: What has to be the same for it to be used.
        index: The index of all heads at the last step, in sequences of up to `LAID` tokens, or chosen on
            the device.
        seen: By head.
        steps: By head the step at which that was found; -1 if it doesn't hold for another.
        centroids: By head those of its clusters.
    """

    shape: tuple[object, ...]
    index: SparseIndex | ChosenIndex | None = None
    seen: dict[int, Seen] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    centroids: dict[int, Centroids] = field(default_factory=dict)


@dataclass(eq=False)
class _Run:
    """What is kept of one generation.

    Args:
        kept: By layer, branch and condition.
        orders: By layer and layout those of heads: both branches of guidance have the same.
    """

    kept: dict[_Key, _Kept] = field(default_factory=dict)
    orders: dict[tuple[str, TokenLayout], dict[int, Order]] = field(default_factory=dict)


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
        self._sound: dict[torch.device, Tensor] = {}  # whether all that devices found is, bool `[]`

    def forget(self) -> None:
        """Drop what is kept."""
        self.settle()
        with self._lock:
            self._runs.clear()

    def settle(self) -> None:
        """Tell what devices found that isn't finite; waits for them."""
        with self._lock:
            found, self._sound = self._sound, {}
        if not all(bool(sound) for sound in found.values()):
            self._tell(NOT_FINITE)

    @property
    def num_bytes(self) -> int:
        """Memory of the indices that are kept."""
        seen: dict[int, Seen | ChosenIndex] = {}
        for run in self._runs.values():
            for kept in run.kept.values():
                of = kept.index
                laid = of.entries if isinstance(of, SparseIndex) else () if of is None else (of,)
                seen |= {id(what): what for what in (*kept.seen.values(), *laid)}
        return sum(map(num_bytes, seen.values()))

    def _run_of(self, context: StepContext) -> _Run:
        """What is kept of a call's generation; canvases may take turns, others follow each other."""
        with self._lock:
            run = self._runs.pop(context.run, None) or _Run()
            others = [*self._runs][1 - TURNS :] if context.active else []
            self._runs = {number: self._runs[number] for number in others}
            self._runs[context.run] = run
            return run

    def find(
        self,
        call: AttentionCall,
        patterns: Sequence[Pattern],
        shape: tuple[object, ...],
        backend: str = "auto",
    ) -> Found:
        """What a call computes.

        Args:
            call: An attention call whose layout is known.
            patterns: One for each head; some are found in calls, others are geometry.
            shape: What has to be the same for what was found to be used again, the plan's stage with it.
            backend: Who computes the call: `"auto"` or a name.
        """
        there = takes(call, patterns, backend)
        shape = (*shape, there)
        context, layout = call.context, call.context.layout
        assert layout is not None, "else this call runs dense"
        run = self._run_of(context)
        key = (call.layer, context.branch, context.condition)
        kept, orders = run.kept.get(key), run.orders.setdefault((call.layer, layout), {})
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
        if not due and len(kept.seen) == len(patterns):
            return Found(joined(kept.seen, call, there))
        return self._found(call, layout, patterns, due, kept, orders, there)

    def _found(
        self,
        call: AttentionCall,
        layout: TokenLayout,
        patterns: Sequence[Pattern],
        due: Sequence[int],
        kept: _Kept,
        orders: dict[int, Order],
        there: bool,
    ) -> Found:
        step, n, rows = call.context.step, layout.seq_len, call.q.shape[1]
        active = call.context.active
        for head, pattern in enumerate(patterns):
            if not pattern.is_estimated and head not in kept.seen:
                kept.seen[head] = pattern_index(pattern, layout)
        counted = {head: patterns[head] for head in due if isinstance(patterns[head].shape, Mass)}
        clustered = {
            head: patterns[head] for head in due if isinstance(patterns[head].shape, Cluster)
        }
        others = counted.keys() | clustered
        told = {head: patterns[head] for head in due if head not in others}
        dense = [head for head, pattern in told.items() if _is_dense_at(pattern, call.context)]
        found = {head: Estimate(dense_entry(n, n), True, 1.0) for head in dense}
        if there:
            whole = [head for head, of in told.items() if sees_all(of, layout)]
            found |= {head: Estimate(dense_entry(n, n), True, 1.0) for head in whole}
        told = {head: of for head, of in told.items() if head not in found}
        _try_orders(call, layout, told, orders)
        ordered: dict[int, Pattern] = {}
        for head, of in told.items():
            order = orders.get(head, of.tile)
            if order is SAMPLED:
                entry = sampled_entry(layout, stride_of(told[head], layout))
                found[head] = Estimate(entry, True, math.nan)
            else:
                ordered[head] = replace(told[head], tile=order)
        if ordered and there:
            q, k, _, scale = _operands(call)
            self._keep_there(kept, blocks_on_device(q, k, ordered, layout, scale), step)
        elif ordered:
            q, k, _, scale = _operands(call)
            more = {"active": active, "valid": _valid(call)}
            found |= blockwise_entries(q, k, ordered, layout, scale, **more)
        if clustered:
            q, k, _, scale = _operands(call)
            found |= cluster_entries(q, k, clustered, layout, scale, kept.centroids)
        self._keep(kept, found, step)
        kept.steps |= dict.fromkeys(dense, -1)
        blocks = {head: blocks_of(pattern, layout) for head, pattern in counted.items()}
        mass_block = math.gcd(*map(mass_stretch, set(blocks.values())))

        def learn(mass: Tensor) -> None:
            if there:
                self._keep_there(kept, blocks_of_mass(mass, counted, layout, mass_block), step)
            else:
                self._keep(kept, _of_mass(mass, counted, layout, mass_block, rows, active), step)
            kept.index = joined(kept.seen, call, there) if there or n <= LAID else None

        now = kept.seen | {head: of.whole for head, of in blocks.items()}
        index = joined(now, call, there)
        if counted:
            return Found(index, mass_block, learn)
        kept.index = index if there or n <= LAID else None
        return Found(index)

    def _keep(self, kept: _Kept, found: Mapping[int, Estimate], step: int) -> None:
        kept.seen |= {head: estimate.seen for head, estimate in found.items()}
        kept.steps |= {head: step if estimate.sound else -1 for head, estimate in found.items()}
        if not all(estimate.sound for estimate in found.values()):
            self._tell(NOT_FINITE)

    def _keep_there(self, kept: _Kept, found: OnDevice, step: int) -> None:
        """As `_keep`; whether it is sound is asked later, and what isn't stays dense until it is due."""
        kept.seen |= found.seen
        kept.steps |= dict.fromkeys(found.seen, step)
        device = found.sound.device
        with self._lock:
            before = self._sound.get(device)
            self._sound[device] = found.sound if before is None else before & found.sound


def _holds(kept: _Kept, head: int, pattern: Pattern, context: StepContext) -> bool:
    """Whether what was found for a head still holds."""
    found, refresh = kept.steps.get(head, -1), pattern.shape.refresh
    if _is_dense_at(pattern, context):
        return False
    return found >= 0 and (refresh is None or context.step - found < refresh)


def _is_dense_at(pattern: Pattern, context: StepContext) -> bool:
    return (context.sigma or 0.0) > getattr(pattern.shape, "dense_above", 1.0)


def _try_orders(
    call: AttentionCall,
    layout: TokenLayout,
    patterns: Mapping[int, Pattern],
    orders: dict[int, Order],
) -> None:
    """Add the token orders of heads that have their own, and whose isn't known yet."""
    tried = {
        head: pattern
        for head, pattern in patterns.items()
        if getattr(pattern.shape, "own_order", False) and head not in orders
    }
    if tried and call.q.shape[1] == layout.seq_len:
        q, k, v, scale = _operands(call)
        best = best_orders(q, k, v, tried, layout, scale)
        orders |= {head: order for head, (order, _) in best.items()}


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
