"""What attention of a language model's layer takes by each pattern, its estimate included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...attend_call import attend_call
from ...call import AttentionCall
from ...estimate import estimated_index
from ...index import SparseIndex
from ...intervals import causal_items
from ...patterns import Pattern
from ...timing import timed

REPEATS = 3


@dataclass(eq=False)
class Costs:
    """Seconds of one attention call of a layer, for each head.

    Args:
        stock: What the host's own attention takes.
        sparse: For each pattern what a head takes in a layer whose heads all have it, estimate included.
        call: The call that was timed: its tensors serve to find the break-even.
    """

    stock: float
    sparse: list[float]
    call: AttentionCall = field(repr=False)


def costs_of(call: AttentionCall, patterns: Sequence[Pattern]) -> Costs:
    """Time a call's stock attention, and each pattern for all of its heads; the fastest of three in turn.

    Args:
        call: A whole call.
        patterns: What is timed, dense first.
    """
    heads, device = call.q.shape[2], call.q.device
    kept = _detached(call)
    runs = [call.stock, *(lambda p=p: _run(kept, [p] * heads) for p in patterns)]
    best = [float("inf")] * len(runs)
    for _ in range(REPEATS):
        for place, run in enumerate(runs):
            best[place] = min(best[place], timed(run, device))
    return Costs(best[0] / heads, [seconds / heads for seconds in best[1:]], kept)


def _detached(call: AttentionCall) -> AttentionCall:
    """The call's tensors alone, in plain causal order; of its host nothing is kept."""
    q, k, v = (x.detach().clone() for x in (call.q, call.k, call.v))
    return _causal_call(call, q, k, v)


def index_of(call: AttentionCall, patterns: Sequence[Pattern]) -> SparseIndex:
    """What a call's heads see by a pattern each, as the runtime finds it."""
    q, k = call.q.transpose(1, 2), call.k.transpose(1, 2)
    where = next((m.until(k.shape[2]) for m in call.context.modalities), None)
    shapes = [pattern.shape for pattern in patterns]
    return estimated_index(q, k, shapes, scale=call.scale, modalities=where)


def _run(call: AttentionCall, patterns: Sequence[Pattern]) -> None:
    attend_call(call, index_of(call, patterns))


def shortened(call: AttentionCall, tokens: int) -> AttentionCall:
    """The call over its first tokens."""
    return _causal_call(call, *(x[:, :tokens] for x in (call.q, call.k, call.v)))


def _causal_call(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> AttentionCall:
    def stock() -> Tensor:
        q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
        shared = q.shape[2] != k.shape[2]
        out = scaled_dot_product_attention(
            q_, k_, v_, is_causal=True, scale=call.scale, enable_gqa=shared
        )
        return out.transpose(1, 2)

    rows = causal_items(q.shape[0], q.shape[1])
    return AttentionCall(
        call.layer, q, k, v, None, None, call.scale, call.context, None, stock, rows=rows
    )
