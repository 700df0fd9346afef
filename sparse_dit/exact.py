"""Exact attention over what a call's mask lets through, and nothing else: no plan, no approximation."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .account import Account, Ran
from .attend_call import attend_call
from .call import AttentionCall
from .index import dense_index
from .intervals import RowIntervals
from .runtime import FEW_QUERIES, LEAST_QUERIES, UNGUARDED

ALL_SEEN = "every query sees every key"
LEAST_PAIRS = 128 * 128  # of a head's queries and keys: below, a call costs more than it saves
SHORT = "a short call, which stock attention computes as fast"
PLANNED = {ALL_SEEN, FEW_QUERIES, SHORT}


class Exact:
    """The intercept of `patch(model, "exact")`: stock attention's numbers to rounding, in less time.

    Stock attention computes all pairs of queries and keys as soon as it is given a mask, and repeats the keys
    that heads share. This computes the pairs inside the mask's row intervals.

    Args:
        component: Name of the component, for the account.
        backend: `"auto"` or one that `sparse_attention` knows.
        nan_guard: See `sparse_attention`.
    """

    def __init__(self, component: str, backend: str, nan_guard: bool = False) -> None:
        self.component = component
        self.backend = backend
        self.nan_guard = nan_guard
        self._account = Account(component, PLANNED)

    def __call__(self, call: AttentionCall) -> Tensor:
        """Attention's output `[B, N, H, D]`."""
        rows = call.intervals
        pairs = call.q.shape[0] * call.q.shape[2] * call.q.shape[1] * call.k.shape[1]
        reason = self._stock_because(call, rows)
        if reason is not None or rows is None:
            self._account.warn(reason or ALL_SEEN)
            out, density, name = call.stock(), 1.0, None
        else:
            sizes = call.q.shape[2], call.q.shape[1], call.k.shape[1]
            index = dense_index(*sizes, call.q.device)  # the row intervals say the rest
            out, name = attend_call(call, index, self.backend, self.nan_guard)
            inside = rows.pairs(call.k.shape[1], call.q.shape[1]) * call.q.shape[2]
            if call.attn_mask is None:  # stock leaves out what comes later, too
                pairs = inside
            density = inside / max(pairs, 1)
        way = (call.layer, None, reason, name)
        self._account.count(way, call.k.shape[1], pairs, density)
        return out

    @property
    def decode(self) -> Callable[[str, int, int], None]:
        """Counts a call of one query, which a language model's seam leaves to stock attention."""
        return self._account.decode

    def forget(self) -> None:
        """Nothing is kept from one call for another."""

    def __reduce__(self):
        return Exact, (self.component, self.backend, self.nan_guard)

    @property
    def notes(self) -> tuple[str, ...]:
        """Nothing: it does what it says."""
        return ()

    @property
    def ran(self) -> tuple[Ran, ...]:
        """The account, one entry for each layer, way of running and length of the sequence."""
        return self._account.ran

    def _stock_because(self, call: AttentionCall, rows: RowIntervals | None) -> str | None:
        if call.unsupported:
            return f"the host asked for {call.unsupported}"
        if rows is None:
            return ALL_SEEN
        if call.q.shape[1] < LEAST_QUERIES:
            return FEW_QUERIES
        if call.q.shape[1] * call.k.shape[1] < LEAST_PAIRS:
            return SHORT
        if call.sinks is not None and self.nan_guard:
            return UNGUARDED
        return None
