"""What the rows of a causal call see, and how often keys and offsets are seen.

The rows are the last N of M tokens. A row's own key is `row + M - N`, an offset how far back a key lies.
Letters in shapes: B batch (1 if all items are alike), N rows, M keys, R sampled rows, C bins of 64 offsets.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..backends.cpu.estimates import BIN
from ..intervals import RowIntervals, causal_rows
from ..on_cpu import on_cpu


@dataclass(frozen=True, eq=False)
class CallRows:
    """Rows of a call, or some of them, and the keys that each sees.

    Args:
        rows: int32 `[B, N]`, or `[B, R]`.
        start, stop: int32, the same shape: a row sees keys from start to stop, none after its own; equal if
            it sees none.
        offset: M - N: a row's own key comes so far after its number.
        num_keys: M.

    Attributes:
        cache: What was made of them, so that a model's layers make it once for a call.
    """

    rows: Tensor
    start: Tensor
    stop: Tensor
    offset: int
    num_keys: int
    cache: dict[object, Tensor | CallRows] = field(default_factory=dict, init=False, repr=False)

    def column_rows(self, local: int = 0) -> Tensor:
        """int64 `[B, M]`: how many rows see each key, at least `local` keys back of their own."""
        if (found := self.cache.get(("columns", local))) is None:
            stop = torch.minimum(self.stop, self.rows + self.offset + 1 - local)
            found = self.cache[("columns", local)] = _holding(self.start, stop, self.num_keys)
        assert isinstance(found, Tensor)
        return found

    @functools.cached_property
    def diagonal_pairs(self) -> Tensor:
        """int64 `[B, C]`: how many pairs of a row and a key each bin of 64 offsets has."""
        own = self.rows + self.offset
        pairs = _holding(own - self.stop + 1, own - self.start + 1, self.num_keys)
        pad = -self.num_keys % BIN
        return torch.nn.functional.pad(pairs, (0, pad)).unflatten(1, (-1, BIN)).sum(-1)

    def budget(self, keys: int) -> int:
        """Pairs of all rows if each computes at most so many of its keys."""
        return int((self.stop - self.start).clamp(0, keys).sum())

    def of(self, which: Tensor) -> CallRows:
        """Some of the rows, by bool `[N]`."""
        rows, start, stop = (x[:, which] for x in (self.rows, self.start, self.stop))
        return CallRows(rows, start, stop, self.offset, self.num_keys)

    def every_other(self) -> CallRows:
        """Half of the rows, the first among them."""
        return self.of(torch.arange(self.rows.shape[1]) % 2 == 0)

    def sinks(self, count: int) -> Tensor:
        """Bool `[M]`: the `count` first keys of every sequence: of the padded ones and of packed ones.

        A sequence begins where more than `count` rows' keys do, so that a sliding window begins none.
        """
        if (found := self.cache.get(("sinks", count))) is None:
            found = self.cache[("sinks", count)] = self._sinks(count)
        assert isinstance(found, Tensor)
        return found

    def _sinks(self, count: int) -> Tensor:
        found = torch.zeros(self.num_keys, dtype=torch.bool)
        for start, stop in zip(self.start, self.stop, strict=True):
            first, rows = start[stop > start].unique(return_counts=True)
            longest = rows >= min(int(rows.max()), count + 1) if len(rows) else rows.bool()
            for key in first[longest].tolist():
                found[key : key + count] = True
        return found


def _holding(first: Tensor, last: Tensor, size: int) -> Tensor:
    """How many intervals from `first` to before `last` hold each number below `size`; int64 `[B, size]`."""
    last = torch.maximum(first, last)
    change = torch.zeros(first.shape[0], size + 1, dtype=torch.int64)
    one = torch.ones((), dtype=torch.int64).expand(first.shape)
    change.scatter_add_(1, first.clamp(0, size).long(), one)
    change.scatter_add_(1, last.clamp(0, size).long(), -one)
    return change.cumsum(1)[:, :size]


def call_rows(num_queries: int, num_keys: int, rows: RowIntervals | None) -> CallRows:
    """All rows of a causal call whose own intervals are `rows`; one item if there are none.

    The same object for the same `rows` object, or for the same numbers.
    """
    if rows is None or (rows.start is None and rows.stop is None):
        return _causal(num_queries, num_keys)
    key = ("rows of a causal call", num_queries, num_keys)
    if (found := rows.cache.get(key)) is None:
        found = rows.cache[key] = _met(num_queries, num_keys, rows)
    assert isinstance(found, CallRows)
    return found


def _met(num_queries: int, num_keys: int, rows: RowIntervals) -> CallRows:
    causal = _causal(num_queries, num_keys)
    both = RowIntervals(rows.start, rows.stop).to("cpu").meet(RowIntervals(stop=causal.stop))
    start, stop = (x.contiguous() for x in both.bounds(num_keys, num_queries))
    return CallRows(causal.rows.expand(start.shape), start, stop, causal.offset, num_keys)


@functools.lru_cache(maxsize=64)
@on_cpu
def _causal(num_queries: int, num_keys: int) -> CallRows:
    offset = num_keys - num_queries
    stop = causal_rows(num_queries, num_keys, offset).stop
    assert stop is not None, "causal order has stops"
    rows = torch.arange(num_queries, dtype=torch.int32)[None]
    return CallRows(rows, torch.zeros_like(rows), stop[None], offset, num_keys)


def sample_rows(call: CallRows, kind: Literal["last", "spread", "both"], sampled: int) -> CallRows:
    """Some rows of a call: of those that see their own key, which rows of padding don't.

    Items with fewer such rows than others get rows that see nothing.
    """
    if (found := call.cache.get((kind, sampled))) is None:
        found = call.cache[(kind, sampled)] = _sampled(call, kind, sampled)
    assert isinstance(found, CallRows)
    return found


def _sampled(call: CallRows, kind: str, sampled: int) -> CallRows:
    parts = [_sample(item, kind, sampled) for item in _sound_rows(call)]
    most = max([1, *map(len, parts)])
    at = torch.stack([torch.nn.functional.pad(part, (0, most - len(part))) for part in parts])
    real = torch.arange(most) < torch.tensor([[len(part)] for part in parts])
    start, stop = (x.gather(1, at) * real for x in (call.start, call.stop))
    rows = call.rows.expand(len(at), -1).gather(1, at)
    return CallRows(rows.contiguous(), start, stop, call.offset, call.num_keys)


def _sound_rows(call: CallRows) -> list[Tensor]:
    own = call.rows + call.offset
    return [row.nonzero()[:, 0] for row in (call.start <= own) & (call.stop > own)]


def _sample(rows: Tensor, kind: str, sampled: int) -> Tensor:
    """The last of some rows, so many spread over them, or both; each once, ascending."""
    if len(rows) <= sampled:
        return rows
    last = torch.arange(len(rows) - sampled, len(rows))
    if kind == "last":
        return rows[last]
    spread = ((torch.arange(sampled, dtype=torch.float64) + 0.5) * len(rows) / sampled).long()
    return rows[spread if kind == "spread" else torch.cat([spread, last]).unique()]
