"""Outputs of heads that are computed at some steps alone, kept for the steps between.

What a head gave is taken again in the same run, stage and branch, under the same condition, at the same size,
and fewer steps later than the head's `every`; whatever else comes is computed. So nothing of another
generation is given out, and nothing older than the plan says.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .autocast import autocast_dtype
from .call import AttentionCall
from .index import MAX_GROUP, PatternIndex, SparseIndex
from .patterns import Pattern

_Key = tuple[str, str, int]  # layer, branch, condition


@dataclass(frozen=True, eq=False)
class Turn:
    """What one call of a layer computes and what it takes again.

    Args:
        groups: For each `every` above 1 the heads that have it.
        taken: For those of them that aren't computed now, what they gave: `[B, N, heads, D]`.
        key: By which the call's outputs are kept; None if they can't be.
    """

    groups: Mapping[int, tuple[int, ...]]
    taken: Mapping[int, Tensor]
    key: _Key | None = None

    @property
    def skipped(self) -> tuple[int, ...]:
        """Heads that aren't computed."""
        return tuple(head for every in self.taken for head in self.groups[every])

    def filled(self, out: Tensor) -> Tensor:
        """`out` `[B, N, H, D]` with what was taken written into it."""
        for every, values in self.taken.items():
            out[:, :, places(self.groups[every], out.device)] = values
        return out


NOTHING = Turn({}, {})


@dataclass(frozen=True, eq=False)
class _Kept:
    """What the heads of one `every` gave: `[B, N, heads, D]`, when, and for what."""

    out: Tensor
    step: int
    sigma: float
    shape: tuple[object, ...]


class Reuse:
    """The outputs of heads of one transformer that are kept for later steps of a run. A copy is empty.

    For each layer and branch of guidance it holds the output (batch x tokens x head_dim numbers) of each head
    whose `every` is above 1, until the step that last needs it, another run, or `forget`.
    """

    def __init__(self) -> None:
        self._run = -1
        self._kept: dict[_Key, dict[int, _Kept]] = {}
        self._last: dict[_Key, int] = {}  # step of the last call
        self._doubled: set[_Key] = set()  # called twice in a step: which one it is can't be told

    def forget(self) -> None:
        """Drop all that is kept."""
        self._kept.clear()
        self._last.clear()
        self._doubled.clear()

    @property
    def num_bytes(self) -> int:
        """Memory of what is kept."""
        outs = [kept.out for groups in self._kept.values() for kept in groups.values()]
        return sum(out.numel() * out.element_size() for out in outs)

    def turn(self, call: AttentionCall, stage: int, patterns: Sequence[Pattern]) -> Turn:
        """Which heads a call computes; to be asked once a call.

        Args:
            call: The attention call.
            stage: The number of the plan's stage that the call falls into.
            patterns: The pattern of each head, `[H]`.
        """
        if call.context.run != self._run:
            self.forget()
            self._run = call.context.run
        groups: dict[int, tuple[int, ...]] = {}
        for head, pattern in enumerate(patterns):
            if pattern.every > 1:
                groups[pattern.every] = (*groups.get(pattern.every, ()), head)
        key = self._key(call) if groups else None
        if key is None:
            return NOTHING
        shape, sigma = shape_of(call, stage), call.context.sigma or 0.0
        taken = {
            every: kept.out
            for every, kept in self._kept.get(key, {}).items()
            if 0 < call.context.step - kept.step < every
            and sigma <= kept.sigma
            and kept.shape == shape
            and every in groups
        }
        return Turn(groups, taken, key)

    def keep(self, call: AttentionCall, stage: int, turn: Turn, out: Tensor) -> None:
        """Keep what a call computed and drop what won't be needed again.

        Args:
            call, stage: As for `turn`.
            turn: The result of `turn` for this call.
            out: `[B, N, H, D]`, the call's output.
        """
        if turn.key is None:
            return
        step, sigma = call.context.step, call.context.sigma or 0.0
        kept = self._kept.setdefault(turn.key, {})
        for every, heads in turn.groups.items():
            if every not in turn.taken:
                part = out[:, :, places(heads, out.device)].detach()
                kept[every] = _Kept(part, step, sigma, shape_of(call, stage))
            elif step - kept[every].step == every - 1:
                del kept[every]

    def _key(self, call: AttentionCall) -> _Key | None:
        """What the call's outputs may be kept by; None if they can't be told from others'."""
        context = call.context
        tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v))
        if context.condition is None or call.split is not None or tracked:
            return None
        key = (call.layer, context.branch, context.condition)
        if self._last.get(key) == context.step:
            self._doubled.add(key)
            self._kept.pop(key, None)
        self._last[key] = context.step
        return None if key in self._doubled else key


@functools.lru_cache(maxsize=256)
def places(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """Heads as int64 on a device; the same object for the same arguments, as a copy there waits for it."""
    return torch.tensor(heads, device="cpu").to(device)


def without(index: SparseIndex, heads: Sequence[int]) -> SparseIndex:
    """The index with nothing to compute for some heads, on the same device."""
    device = index.entries[0].q_offsets.device
    starts = range(0, index.num_queries, MAX_GROUP)
    bounds = torch.tensor([*starts, index.num_queries], dtype=torch.int32, device=device)
    none = torch.zeros(len(bounds), dtype=torch.int32, device=device)
    runs = torch.zeros(0, 2, dtype=torch.int32, device=device)
    empty = PatternIndex(index.num_queries, index.num_keys, None, None, bounds, none, runs)
    used = [-1 if head in heads else p for head, p in enumerate(index.head_to_pattern)]
    left = sorted(set(used) - {-1})
    place = {p: number for number, p in enumerate(left)} | {-1: len(left)}
    entries = (*(index.entries[p] for p in left), empty)
    return SparseIndex(entries, tuple(place[p] for p in used), index.rows)


def shape_of(call: AttentionCall, stage: int) -> tuple[object, ...]:
    """What has to be the same for what one call gave or found to be used in another."""
    lengths = (call.q.shape[1], call.v.shape[1])
    return (call.context.layout, call.context.sorted_by, lengths, *kind_of(call, stage))


def kind_of(call: AttentionCall, stage: int) -> tuple[object, ...]:
    """What of that has nothing to do with how many tokens there are, and how they lie."""
    q, v = call.q, call.v
    dtypes = (q.dtype, autocast_dtype(q.device.type))
    return (stage, len(q), q.shape[2:], v.shape[2:], dtypes, q.device)
