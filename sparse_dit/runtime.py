"""What runs in place of stock attention for each call, and the account of what did run."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .account import Account, Ran, Way
from .attend_call import attend_call, attended_call
from .autocast import lowered
from .call import AttentionCall, item_of
from .estimate import Estimates, estimated_index, sighted
from .fastest import FASTEST, STOCK, Fastest
from .index import PatternIndex, SparseIndex, build_index, dense_index
from .layout import Tile, TokenLayout
from .making import Making, counted, timed
from .patterns import Pattern
from .plan import ComponentPlan
from .reuse import Reuse, shape_of, without
from .settled import Settled, steps_between

MAX_LAYOUTS = 8
_Tokens = tuple[TokenLayout, Tile | None]  # and the tile by which they have been sorted

# the plan's own choice, so nothing to warn of
NOT_NAMED = "layer not in the plan"
NOT_COVERED = "noise level or branch not in the plan"
ALL_DENSE = "every head dense in the plan"
ALL_SEEN = "at this size the plan's patterns cover everything"
LEAST_QUERIES = 16  # of a language model: below, there is nothing to gain
UNGUARDED = "attention sinks, which nan_guard doesn't know"
FEW_QUERIES = f"fewer than {LEAST_QUERIES} queries"
PLANNED = {NOT_NAMED, NOT_COVERED, ALL_DENSE, ALL_SEEN, FEW_QUERIES}
UNKNOWN_BRANCH = (
    "each stage of the plan is for one guidance branch, and this forward computes both or names none "
    '(in a loop of your own: with transformer.cache_context("cond"))'
)


class How(NamedTuple):
    """In which ways a plan is run, as `patch` takes them.

    Args:
        backend: `"auto"` or one that `sparse_attention` knows.
        nan_guard: See `sparse_attention`.
        dense: Who computes calls that are dense: `"stock"` or `"fastest"`, see `Fastest`.
    """

    backend: str = "auto"
    nan_guard: bool = False
    dense: str = STOCK


class Runtime:
    """The intercept of one patched transformer: sparse where its plan says so, stock elsewhere.

    A copy shares the plan and starts with an empty account, and with no outputs kept for other steps.

    Attributes:
        making: Told how long indices take to make; None where nobody wants to know.
    """

    def __init__(
        self,
        component: str,
        plan: ComponentPlan,
        backend: str,
        nan_guard: bool = False,
        dense: str = STOCK,
    ) -> None:
        self.component = component
        self.plan = plan
        self.backend = backend
        self.nan_guard = nan_guard
        self.dense = dense
        self.making: Making | None = None
        self._indices: OrderedDict[_Tokens, dict[tuple, SparseIndex]] = OrderedDict()
        self._moved: dict[tuple[PatternIndex, torch.device], PatternIndex] = {}
        self._account = Account(component, PLANNED)
        self._fastest = Fastest(self._account.tell, backend) if dense == FASTEST else None
        self._shapes = {  # of the heads of each layer and stage that is estimated
            (layer, stage): [head.pattern.shape for head in heads]
            for layer, stages in plan.layers.items()
            for stage, heads in enumerate(stages)
            if any(head.pattern.is_causal for head in heads)
        }
        self._blockwise = {  # the heads' patterns, where some are found in calls and kept
            (layer, stage): [head.pattern for head in heads]
            for layer, stages in plan.layers.items()
            for stage, heads in enumerate(stages)
            if any(head.pattern.is_estimated and not head.pattern.is_causal for head in heads)
        }
        self._estimates = Estimates(self._account.tell) if self._blockwise else None
        reuses = any(pattern.every > 1 for pattern in plan.distinct_patterns)
        self._reuse = Reuse() if reuses else None
        settles = any(pattern.settled_every > 1 for pattern in plan.distinct_patterns)
        self._settled = Settled() if settles else None

    def __call__(self, call: AttentionCall) -> Tensor:
        """Attention's output `[B, N, H, D]`."""
        context = call.context
        stage = self.plan.stage(context.sigma, context.branch, context.phase)
        reason = self._planned_dense(call, stage) or self._forced_dense(call, stage)
        if reason or stage is None:
            return self._dense(call, stage, reason or NOT_COVERED)
        if self._settled is None and self._reuse is None:
            return self._attend(call, stage, ())
        patterns = [head.pattern for head in self.plan.layers[call.layer][stage]]
        if self._settled is not None and (every := steps_between(call, patterns)) > 1:
            ways = (lambda x: self._attend(x, stage, ())), (lambda x: self._attend_last(x, stage))
            return self._settled.attend(call, stage, every, *ways)
        if self._reuse is None:
            return self._attend(call, stage, ())
        turn = self._reuse.turn(call, stage, patterns)
        out = turn.filled(self._attend(call, stage, turn.skipped))
        self._reuse.keep(call, stage, turn, out)
        return out

    @property
    def decode(self) -> Callable[[str, int, int], None]:
        """Counts a call of one query, which a language model's seam leaves to stock attention."""
        return self._account.decode

    def forget(self) -> None:
        """Drop the outputs and indices that are kept for other steps."""
        if self._reuse is not None:
            self._reuse.forget()
        if self._estimates is not None:
            self._estimates.forget()
        if self._settled is not None:
            self._settled.forget()

    def _attend_last(self, call: AttentionCall, stage: int) -> Tensor:
        """Attention of a call's last queries over all keys."""
        index = dense_index(call.q.shape[2], call.q.shape[1], call.k.shape[1], call.q.device)
        out, name = attend_call(call, index, self.backend, self.nan_guard)
        density = call.q.shape[1] / call.k.shape[1]
        self._count(call, (call.layer, stage, None, name), density, call.k.shape[1])
        return out

    def _attend(self, call: AttentionCall, stage: int, skipped: tuple[int, ...]) -> Tensor:
        """Attention as the plan says for the stage, `[B, N, H, D]`; the heads `skipped` aren't computed."""
        if patterns := self._blockwise.get((call.layer, stage)):
            return self._attend_found(call, stage, patterns, skipped)
        shapes = self._shapes.get((call.layer, stage))
        prompts = call.context.modalities
        if shapes and len(prompts) > 1 and sighted(shapes) and len(set(prompts)) > 1:
            items = [item_of(call, b) for b in range(len(prompts))]
            return torch.cat([self._attend(item, stage, skipped) for item in items])
        index = self._estimate(call, shapes) if shapes else self._index(call, stage, skipped)
        if index.is_dense:
            heads = self.plan.layers[call.layer][stage]
            planned = all(head.pattern.computed.is_dense for head in heads)
            return self._dense(call, stage, ALL_DENSE if planned else ALL_SEEN)
        if call.split is None:
            out, name = attend_call(call, index, self.backend, self.nan_guard)
        else:
            q, k, v = lowered(call.q, call.k, call.v)
            out, name = call.split.attend(q, k, v, index, call.scale, self.backend, self.nan_guard)
        self._count(call, (call.layer, stage, None, name), index.density)
        return out

    def _attend_found(
        self, call: AttentionCall, stage: int, patterns: list[Pattern], skipped: tuple[int, ...]
    ) -> Tensor:
        """As `_attend`, where some heads' patterns are found in calls."""
        batch = call.q.shape[0]
        if call.context.active and batch > 1:  # prompts differ, as do both sides of guidance
            items = [item_of(call, b, condition=b) for b in range(batch)]
            return torch.cat([self._attend_found(x, stage, patterns, skipped) for x in items])
        assert self._estimates is not None, "the plan has such patterns"
        find = functools.partial(
            self._estimates.find, call, patterns, shape_of(call, stage), self.backend
        )
        found = timed(self.making, find, call.q.device)
        index, mass = found.index, None
        if found.mass_block is None and index.is_dense:
            out = self._dense(call, stage, ALL_SEEN)
        else:
            if isinstance(index, SparseIndex):
                index = index if call.q.is_cpu else index.to(call.q.device)
                index = without(index, skipped) if skipped else index
            elif skipped:
                index = index.without(skipped)
            if found.mass_block is None:
                out, name = attend_call(call, index, self.backend, self.nan_guard)
            else:
                attend = functools.partial(attended_call, call, index, self.backend)
                name, attended = counted(self.making, attend, found.mass_block, call.q.device)
                out, mass = attended.out, attended.mass
            self._count(call, (call.layer, stage, None, name), index.density)
        if found.learn is not None and mass is not None:
            timed(self.making, functools.partial(found.learn, mass), call.q.device)
        return out

    def _estimate(self, call: AttentionCall, shapes: list[Any]) -> SparseIndex:
        """What the call's own queries and keys say that is worth computing, by the shape of each head."""
        q, k = lowered(call.q, call.k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        rows = None if call.attn_mask is None else call.rows
        modalities = next(iter(call.context.modalities), None) if sighted(shapes) else None
        if modalities is not None and modalities.unknown is not None:
            self._account.tell(f"images are taken for text: {modalities.unknown}")
        return estimated_index(q, k, shapes, scale=call.scale, rows=rows, modalities=modalities)

    def __reduce__(self):
        return Runtime, (self.component, self.plan, self.backend, self.nan_guard, self.dense)

    def __deepcopy__(self, memo: dict[int, object]) -> Runtime:
        return Runtime(self.component, self.plan, self.backend, self.nan_guard, self.dense)

    @property
    def ran(self) -> tuple[Ran, ...]:
        """The account, one entry for each layer, stage, way of running and length of the sequence."""
        return self._account.ran

    @property
    def kept_bytes(self) -> int:
        """Memory of the indices that are kept for later steps."""
        return 0 if self._estimates is None else self._estimates.num_bytes

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be done as the plan says, though it ran sparse; and who computed dense calls.

        Waits for devices that found blocks.
        """
        if self._estimates is not None:
            self._estimates.settle()
        return self._account.notes + (self._fastest.notes if self._fastest else ())

    def _planned_dense(self, call: AttentionCall, stage: int | None) -> str | None:
        if call.layer not in self.plan.layers:
            return NOT_NAMED
        if stage is not None:
            return None
        sigma, branch, phase = call.context.sigma, call.context.branch, call.context.phase
        named = branch != "any" or all(
            self.plan.stage(sigma, b, phase) is None for b in ("cond", "uncond")
        )
        return NOT_COVERED if named else UNKNOWN_BRANCH

    def _forced_dense(self, call: AttentionCall, stage: int | None) -> str | None:
        """Why the plan can't be followed in this call; None if it can."""
        layout, tokens = call.context.layout, _tokens(call)
        least, most = self.plan.valid_tokens
        if call.split is not None and (call.layer, stage) in self._blockwise:
            return "blocks are found in all of a call's tokens, and they lie in several processes"
        if call.unsupported and call.split is None:
            return f"the host asked for {call.unsupported}"
        if layout is None:
            return "the forward's arguments don't tell the token grid"
        if layout.seq_len != tokens:
            return f"attention over {tokens} tokens, but the grid {layout} has {layout.seq_len}"
        num_heads, _ = self.plan.heads[call.layer]
        if call.q.shape[2] != num_heads:
            return f"{call.q.shape[2]} heads in this process, but the plan has {num_heads}"
        if call.q.shape[1] < LEAST_QUERIES and call.context.phase != "any":
            return FEW_QUERIES
        if (call.layer, stage) in self._shapes and call.context.phase == "any":
            return "the plan's patterns are for causal order, and this model sees both ways"
        if call.rows is None and call.context.phase != "any":
            return "a language model's plan is for causal order, and this call has none"
        if call.rows is not None and call.context.phase != "any" and _sees_ahead(call):
            return "a language model's plan is for causal order, and text of this call sees what comes later"
        if call.sinks is not None and self.nan_guard:
            return UNGUARDED
        if tokens < least:
            return f"{tokens} tokens are below the break-even of {least}"
        if most is not None and tokens > most:
            return f"{tokens} tokens are more than the {most} that the plan is for"
        return None

    def _dense(self, call: AttentionCall, stage: int | None, reason: str) -> Tensor:
        self._account.warn(reason)
        if self._fastest is None or call.unsupported or call.split or reason == FEW_QUERIES:
            out = call.stock()
        else:
            out = self._fastest.attend(call)
        self._count(call, (call.layer, stage, reason, None), 1.0)
        return out

    def _count(
        self, call: AttentionCall, way: Way, density: float | Tensor, queries: int | None = None
    ) -> None:
        tokens = _tokens(call)
        pairs = call.q.shape[0] * call.q.shape[2] * (queries or call.q.shape[1]) * tokens
        if call.rows is not None and queries is None:
            pairs = call.rows.pairs(call.k.shape[1], call.q.shape[1]) * call.q.shape[2]
        self._account.count(way, tokens, pairs, density)

    def _index(self, call: AttentionCall, stage: int, skipped: tuple[int, ...]) -> SparseIndex:
        layout, sorted_by, device = call.context.layout, call.context.sorted_by, call.q.device
        assert layout is not None, "else this call runs dense"
        indices = self._indices.get((layout, sorted_by))
        if indices is None:
            indices = self._indices.setdefault((layout, sorted_by), {})
            if len(self._indices) > MAX_LAYOUTS:
                self._indices.popitem(last=False)
                self._moved.clear()
        key = (call.layer, stage, device, skipped)
        if key not in indices and skipped:
            indices[key] = without(self._index(call, stage, ()), skipped)
        if key not in indices:
            patterns = [head.pattern for head in self.plan.layers[call.layer][stage]]
            indices[key] = self._on(build_index(patterns, layout, sorted_by=sorted_by), device)
        return indices[key]

    def _on(self, index: SparseIndex, device: torch.device) -> SparseIndex:
        """The index on `device`; layers that share a pattern share its tensors there too."""
        if device.type == "cpu":
            return index
        for entry in index.entries:
            if (entry, device) not in self._moved:
                self._moved[entry, device] = entry.to(device)
        return replace(index, entries=tuple(self._moved[e, device] for e in index.entries))


def _tokens(call: AttentionCall) -> int:
    """Tokens that attention runs over, on all processes."""
    return call.k.shape[1] if call.split is None else call.split.num_tokens


def _sees_ahead(call: AttentionCall) -> bool:
    """Whether rows of text see later keys than causal order lets them; an image's may see all of it."""
    rows, n, m = call.rows, call.q.shape[1], call.k.shape[1]
    assert rows is not None, "it is asked of calls that have some"
    key = ("text sees ahead", n, m)
    if key not in rows.cache:
        _, stop = rows.bounds(m, n)
        ahead = (stop > torch.arange(m - n + 1, m + 1, device=stop.device)).cpu()
        kinds = [item.kinds()[m - n :] == 0 for item in call.context.modalities]
        rows.cache[key] = bool((ahead & torch.stack(kinds) if kinds else ahead).any())
    return bool(rows.cache[key])
