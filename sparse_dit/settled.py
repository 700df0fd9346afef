"""What attention gave for tokens that a diffusion language model isn't denoising, taken again for some steps.

A generation computes all of its tokens in each step, but most of them are the prompt and what is written,
and they change little while a block of new tokens is denoised. Their attention is computed at some steps;
between, only that of the tokens being denoised is, over all keys. Fast-dLLM
(https://arxiv.org/abs/2505.22618) keeps these tokens' keys and values instead, from block to block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from .call import AttentionCall, StepContext
from .intervals import RowIntervals
from .patterns import Pattern
from .reuse import shape_of

TURNS = 4  # generations whose outputs are kept at once
IDLE = 2 * TURNS  # forwards of others after which a generation is taken to have ended


@dataclass(frozen=True, eq=False)
class _Kept:
    """Output of the tokens before those being denoised, `[B, N - active, H, D]`, when, and for what."""

    out: Tensor
    step: int
    active: int
    shape: tuple[object, ...]


@dataclass(eq=False)
class _Run:
    """What is kept of one generation, by layer and branch, and the number of its last forward."""

    kept: dict[tuple[str, str], _Kept] = field(default_factory=dict)
    last: int = 0


class Settled:
    """Outputs of one model that are kept for later steps: for each layer batch x tokens x heads x head_dim.

    They are taken again in the same generation, stage and guidance branch, at the same size, for the same
    tokens being denoised, and fewer steps later than is said. A copy is empty.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[int, _Run] = {}  # the one used last is the last
        self._forwards = 0
        self._now = (-1, -1)  # run and step

    def forget(self) -> None:
        """Drop all that is kept."""
        with self._lock:
            self._runs.clear()

    @property
    def num_bytes(self) -> int:
        """Memory of what is kept."""
        outs = [kept.out for run in self._runs.values() for kept in run.kept.values()]
        return sum(out.numel() * out.element_size() for out in outs)

    def _run_of(self, context: StepContext) -> _Run:
        """What is kept of a forward's generation; others that have ended are dropped."""
        with self._lock:
            if self._now != (context.run, context.step):
                self._now, self._forwards = (context.run, context.step), self._forwards + 1
            run = self._runs.pop(context.run, None) or _Run()
            run.last = self._forwards
            others = [*self._runs.items()][1 - TURNS :]
            self._runs = {n: one for n, one in others if self._forwards - one.last <= IDLE}
            self._runs[context.run] = run
            return run

    def attend(
        self,
        call: AttentionCall,
        stage: int,
        every: int,
        whole: Callable[[AttentionCall], Tensor],
        part: Callable[[AttentionCall], Tensor],
    ) -> Tensor:
        """Attention of a call, `[B, N, H, D]`.

        Args:
            call: Of all tokens of a generation, some of which are being denoised.
            stage: The plan's stage.
            every: For so many steps what was computed is taken.
            whole: Computes a call.
            part: Computes a call of the last tokens alone, over all keys.
        """
        context = call.context
        run = self._run_of(context)
        key, shape = (call.layer, context.branch), shape_of(call, stage)
        kept, before = run.kept.get(key), call.q.shape[1] - context.active
        if (
            kept is not None
            and kept.active == context.active
            and kept.shape == shape
            and 0 < context.step - kept.step < every
        ):
            out = kept.out.new_empty(*call.q.shape[:3], call.v.shape[-1])
            out[:, :before] = kept.out
            out[:, before:] = part(_last(call, context.active))
            return out
        out = whole(call)
        run.kept[key] = _Kept(out[:, :before].detach().clone(), context.step, context.active, shape)
        return out


def steps_between(call: AttentionCall, patterns: Sequence[Pattern]) -> int:
    """For how many steps the output of tokens that aren't being denoised is taken; 1 if there are none.

    Args:
        call: The attention call.
        patterns: Of the layer's heads.
    """
    n, m = call.q.shape[1], call.k.shape[1]
    if not 0 < call.context.active < n or n != m or call.split is not None:
        return 1
    return min(pattern.settled_every for pattern in patterns)


def _last(call: AttentionCall, count: int) -> AttentionCall:
    """A call's last queries, as a call of their own."""
    rows = call.rows
    if rows is not None:
        key = ("last", count)
        if key not in rows.cache:
            sides = (None if x is None else x[:, -count:] for x in (rows.start, rows.stop))
            rows.cache[key] = RowIntervals(*sides)
        found = rows.cache[key]
        assert isinstance(found, RowIntervals)
        rows = found
    mask = call.attn_mask
    return replace(
        call,
        q=call.q[:, -count:],
        attn_mask=mask if mask is None or mask.shape[2] == 1 else mask[:, :, -count:],
        stock=lambda: call.stock()[:, -count:],
        rows=rows,
    )
