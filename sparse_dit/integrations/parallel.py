"""Sparse attention on several devices, under the context parallelism of diffusers.

diffusers gives each process a shard of the tokens. Ulysses exchanges tokens for heads around attention,
so that a process computes some heads over all tokens; ring keeps the queries and sends chunks of keys
round, whose results are merged by their log-sum-exp. Both exchanges and the merge are the host's
(`_templated_context_parallel_attention`); here only what runs between them is sparse.
Sources: DeepSpeed-Ulysses (arXiv 2309.14509), Ring Attention (2310.01889), USP (2405.07719).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..attention import attend, backend_name
from ..cut import cut
from ..index import SparseIndex
from ..layout import TokenLayout
from ..nan_guard import finite_or_dense
from ..on_cpu import on_cpu

CONTEXT_PARALLELISM = "context parallelism"

UNSEEN = -100.0  # log-sum-exp, relative to a row's first, of keys that the row doesn't see
WORTH_MOVING = 1.01  # heads are exchanged if the busiest process gets this much less to do


@dataclass(frozen=True)
class Split:
    """How the tokens and heads of one attention call lie on the processes.

    Args:
        layout: All tokens. Each segment is dealt out in equal shards, one a process.
        ring, ulysses: Processes that share keys in a ring, and that share heads.
        ring_rank, ulysses_rank: This process among them.
        config: The host's `ParallelConfig`.
    """

    layout: TokenLayout
    ring: int
    ulysses: int
    ring_rank: int
    ulysses_rank: int
    config: Any

    @property
    def num_tokens(self) -> int:
        """Tokens on all processes."""
        return self.layout.seq_len

    @property
    def local_tokens(self) -> int:
        """Tokens of this process outside of attention."""
        shard = self.ring_rank * self.ulysses + self.ulysses_rank
        return len(shards(self.layout, self.ring * self.ulysses)[shard])

    def chunk(self, rank: int) -> Tensor:
        """int64: the tokens that ring rank `rank` holds inside attention, in its order."""
        parts = shards(self.layout, self.ring * self.ulysses)
        return torch.cat(parts[rank * self.ulysses : (rank + 1) * self.ulysses])

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: SparseIndex,
        scale: float | None,
        backend: str,
        nan_guard: bool = False,
    ) -> tuple[Tensor, str]:
        """Attention of all processes, which must call this together.

        Args:
            q, k, v: `[B, n, H, D]`, this process' tokens and all heads.
            index: The index of all tokens and heads of the sequence, on the device of `q`.
            scale: As in `sparse_attention`.
            backend, nan_guard: As in `sparse_attention`.

        Returns:
            `[B, n, H, D]` and the name of the backend that ran.

        Raises:
            ValueError: If gradients are asked for.
            NotImplementedError: If a ring is to be guarded against NaN.
        """
        from diffusers.models import attention_dispatch as host

        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise ValueError("sparse attention is for inference; call it under torch.no_grad()")
        if nan_guard and self.ring > 1:
            raise NotImplementedError(
                f"nan_guard needs all keys in one process, got ring_degree={self.ring}; "
                "use ulysses_degree alone, or patch without it"
            )
        order = head_order(index, self.ulysses)
        if order is not None:
            q, k, v = (x[:, :, order] for x in (q, k, v))
        chunks = _Chunks(self, index, order, backend, nan_guard)
        out: Any = host._templated_context_parallel_attention(
            q, k, v, scale=scale, forward_op=chunks, backward_op=None, _parallel_config=self.config
        )
        if order is not None:
            out = out[:, :, sorted(range(len(order)), key=order.__getitem__)]
        return out, chunks.ran

    def part(self, index: SparseIndex, order: list[int] | None, source: int) -> SparseIndex:
        """What this process computes with the keys of ring rank `source`; kept in `index.cache`."""
        name = ("split", self.layout, self.mesh, source)
        if name not in index.cache:
            order = order or list(range(index.num_heads))
            heads = _slots(len(order), self.ulysses)[self.ulysses_rank]
            places = [index.head_to_pattern[order[slot]] for slot in heads]
            used = list(dict.fromkeys(places))
            queries, keys = self.chunk(self.ring_rank), self.chunk(source)
            entries = tuple(cut(index.entries[place], queries, keys) for place in used)
            index.cache[name] = replace(
                index, entries=entries, head_to_pattern=tuple(used.index(p) for p in places)
            )
        found = index.cache[name]
        assert isinstance(found, SparseIndex)
        return found

    @property
    def mesh(self) -> tuple[int, int, int, int]:
        """Sizes and ranks, without the host's objects."""
        return self.ring, self.ulysses, self.ring_rank, self.ulysses_rank


@dataclass
class _Chunks:
    """The host's `forward_op`: once for Ulysses, once a chunk of keys for ring, in ring order."""

    split: Split
    index: SparseIndex
    order: list[int] | None
    backend: str
    nan_guard: bool
    calls: int = 0
    first: Tensor | None = None
    ran: str = ""

    def __call__(
        self,
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        **_: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        source = (self.split.ring_rank + self.calls) % self.split.ring
        self.calls += 1
        part = self.split.part(self.index, self.order, source)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        self.ran = backend_name(q, part, self.backend)
        got = attend(q, k, v, part, scale=scale, backend=self.ran, return_lse=return_lse)
        out = got.out
        if self.nan_guard:
            out = finite_or_dense(out, q, k, v, part.rows, scale)
        out = out.transpose(1, 2)
        if not return_lse:
            return out
        assert got.lse is not None, "it was asked for"
        return out, self._relative(got.lse).transpose(1, 2)

    def _relative(self, lse: Tensor) -> Tensor:
        """LSE less the row's first finite one, in place of -inf, which the host's merge turns to NaN.

        The merge uses differences alone; until a row has seen a key its output is 0 and `UNSEEN`
        gives that no weight.
        """
        unseen = lse.isneginf()
        if self.first is None:
            self.first = lse
        else:
            self.first = torch.where(self.first.isneginf(), lse, self.first)
        return torch.where(unseen, UNSEEN, lse - self.first)


def split_of(
    config: Any, layout: TokenLayout | None, q: Tensor, k: Tensor, mask: Tensor | None
) -> tuple[Split | None, str]:
    """The split of a call that the host would run in parallel, or None; and why stock may have to run.

    Args:
        config: The host's `ParallelConfig`.
        layout: All tokens, as the transformer's arguments tell; None if they don't.
        q, k: `[B, n, H, D]`, this process' tokens.
        mask: The host's mask.
    """
    context = getattr(config, "context_parallel_config", None)
    if mask is not None:
        return None, "context parallelism with a mask"
    if context is None or layout is None or k.shape[2] != q.shape[2]:
        return None, CONTEXT_PARALLELISM
    split = Split(
        layout,
        context.ring_degree,
        context.ulysses_degree,
        context._ring_local_rank,
        context._ulysses_local_rank,
        config,
    )
    if split.local_tokens != q.shape[1]:
        return None, f"context parallelism that gives this process {q.shape[1]} tokens of {layout}"
    return split, CONTEXT_PARALLELISM


def check_split(
    transformer: Any,
    layout: TokenLayout | None,
    num_heads: Collection[int],
    arguments: Mapping[str, Any],
) -> None:
    """Raise ValueError if diffusers can't split this; its own assertions name no numbers.

    A model that diffusers doesn't know how to split is left to the caller's own `cp_plan`.
    """
    config = getattr(transformer, "_parallel_config", None)
    context = getattr(config, "context_parallel_config", None)
    if context is None or layout is None or getattr(type(transformer), "_cp_plan", None) is None:
        return
    text_mask = "encoder_attention_mask"
    if text_mask in transformer._cp_plan.get("", {}) and arguments.get(text_mask) is not None:
        raise ValueError(
            f"{type(transformer).__name__} under context parallelism takes no {text_mask}, got one: "
            "diffusers splits it, but not for each process' heads or keys; "
            "pass None, with prompts of one length"
        )
    processes = context.ring_degree * context.ulysses_degree
    odd = [s.length for s in layout.segments if s.length % processes]
    if odd and not (context.ulysses_anything or context.ring_anything):
        mode = "ring_anything" if context.ulysses_degree == 1 else "ulysses_anything"
        raise ValueError(
            f"context parallelism needs token counts that {processes} processes divide, got {odd[0]}; "
            f"change the size or frames, or use ContextParallelConfig({mode}=True)"
        )
    uneven = [heads for heads in num_heads if heads % context.ulysses_degree]
    if uneven and not context.ulysses_anything:
        raise ValueError(
            f"ulysses_degree must divide the {uneven[0]} heads, got {context.ulysses_degree}; "
            "choose a divisor, or use ContextParallelConfig(ulysses_anything=True)"
        )


@functools.lru_cache(maxsize=32)
@on_cpu
def shards(layout: TokenLayout, processes: int) -> tuple[Tensor, ...]:
    """For each process its tokens, int64, in its order: a shard of each segment in turn."""
    segments = torch.arange(layout.seq_len).split([s.length for s in layout.segments])
    dealt = [segment.tensor_split(processes) for segment in segments]
    return tuple(torch.cat(parts) for parts in zip(*dealt, strict=True))


def head_order(index: SparseIndex, processes: int) -> list[int] | None:
    """Heads in the order in which `processes` take equal shares of them, so that all have as much to do.

    The costliest head that is left goes to the process with the least work that has room.

    Returns:
        For each slot its head; None if the heads' own order is as good.
    """
    name = ("head order", processes)
    if name not in index.cache:
        index.cache[name] = _balanced(index.head_density.tolist(), processes)
    order = index.cache[name]
    assert order is None or isinstance(order, list)
    return order


def busiest(costs: Sequence[float], processes: int) -> float:
    """Work of the busiest process over the mean, if heads are dealt out in the order of `costs`."""
    loads = [sum(costs[slot] for slot in slots) for slots in _slots(len(costs), processes)]
    return max(loads) * processes / sum(loads) if sum(loads) else 1.0


def _balanced(costs: list[float], processes: int) -> list[int] | None:
    room = [len(slots) for slots in _slots(len(costs), processes)]
    loads = [0.0] * processes
    taken: list[list[int]] = [[] for _ in range(processes)]
    for head in sorted(range(len(costs)), key=lambda head: -costs[head]):
        open_ = [p for p in range(processes) if len(taken[p]) < room[p]]
        least = min(open_, key=lambda p: loads[p])
        taken[least].append(head)
        loads[least] += costs[head]
    order = [head for heads in taken for head in sorted(heads)]
    moved = busiest([costs[head] for head in order], processes)
    return order if moved * WORTH_MOVING < busiest(costs, processes) else None


def _slots(num_heads: int, processes: int) -> list[range]:
    """Slots of each process: equal shares, the last of them what is left."""
    share = -(-num_heads // processes)
    return [range(p * share, min((p + 1) * share, num_heads)) for p in range(processes)]
