"""What attention gave for tokens that a diffusion language model isn't denoising, taken again for some steps.

A generation computes all of its tokens in each step, but most of them are the prompt and what is written,
and they change little. Their attention is computed at some steps; between, only that of the last tokens is,
over all keys: those being denoised, the `NEAR` ones before them, and what was written since. Fast-dLLM
(https://arxiv.org/abs/2505.22618) keeps tokens' keys and values instead, from block to block, and dLLM-Cache
(https://arxiv.org/abs/2506.06295) the prompt's features for so many steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from .call import AttentionCall, StepContext
from .intervals import RowIntervals
from .patterns import Pattern
from .reuse import kind_of

TURNS = 4  # generations whose outputs are kept at once
NEAR = 32  # tokens before those being denoised: they change most
MOST = 0.25  # of all tokens, that are computed between
IDLE = 2 * TURNS  # forwards of others after which a generation is taken to have ended


@dataclass(frozen=True, eq=False)
class _Kept:
    """Output of the first tokens, `[B, N - last, H, D]`, when, and for what calls."""

    out: Tensor
    step: int
    kind: tuple[object, ...]


@dataclass(eq=False)
class _Run:
    """What is kept of one generation, by layer and branch, and the number of its last forward."""

    kept: dict[tuple[str, str], _Kept] = field(default_factory=dict)
    last: int = 0


class Settled:
    """Outputs of one model that are kept for later steps: for each layer batch x tokens x heads x head_dim.

    They are taken again in the same generation, stage and guidance branch, fewer steps later than is said,
    while no more than `MOST` of the tokens have come since. A copy is empty.
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
            call: A call of all tokens of a generation, some of which are being denoised.
            stage: The plan's stage.
            every: For so many steps what was computed is taken.
            whole: Computes a call.
            part: Computes a call of the last tokens alone, over all keys.
        """
        context, n = call.context, call.q.shape[1]
        run, key, kind = self._run_of(context), (call.layer, context.branch), kind_of(call, stage)
        kept, near = run.kept.get(key), context.active + NEAR
        if kept is not None and kept.kind == kind and 0 < context.step - kept.step < every:
            before = kept.out.shape[1]
            if near <= n - before <= max(near, MOST * n):
                out = kept.out.new_empty(*call.q.shape[:3], call.v.shape[-1])
                out[:, :before] = kept.out
                out[:, before:] = part(_last(call, n - before))
                return out
        out = whole(call)
        run.kept[key] = _Kept(out[:, : n - near].detach().clone(), context.step, kind)
        return out


def steps_between(call: AttentionCall, patterns: Sequence[Pattern]) -> int:
    """For how many steps the output of tokens that aren't being denoised is taken; 1 if there are none.

    Args:
        call: The attention call.
        patterns: The patterns of the layer's heads.
    """
    n, m = call.q.shape[1], call.k.shape[1]
    if (
        not call.context.active
        or call.context.active + NEAR >= n
        or n != m
        or call.split is not None
    ):
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
