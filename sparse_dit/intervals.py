"""Which keys each query row may see at all: one interval of key tokens a row.

Causal order, padding on either side, packed sequences, sliding windows, prefixes and blocks of them are all
of this form. Letters in shapes: B batch, N query tokens, M key tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .on_cpu import on_cpu


@dataclass(frozen=True, eq=False)
class RowIntervals:
    """Row n sees key tokens `start[n] <= key < stop[n]` of those that an index lists, and no others.

    Bounds may lie beyond the keys; a row whose stop isn't above its start sees nothing.

    Args:
        start: int32 `[N]` in an index, `[B, N]` in a call, any strides; None for 0.
        stop: The same; None for M.

    Attributes:
        cache: What was made of them.
    """

    start: Tensor | None = None
    stop: Tensor | None = None
    cache: dict[object, object] = field(default_factory=dict, init=False, repr=False)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless what is given is int32 of this shape."""
        for name, x in (("row_start", self.start), ("row_stop", self.stop)):
            if x is not None and (x.shape != shape or x.dtype != torch.int32):
                raise ValueError(
                    f"{name} must be int32 {list(shape)}, got {x.dtype} {list(x.shape)}"
                )

    @property
    def uniform(self) -> bool:
        """Whether all rows see the same keys, as far as strides tell: those of `valid_rows` do."""
        given = [x for x in (self.start, self.stop) if x is not None]
        return all(x.stride(-1) == 0 or x.shape[-1] == 1 for x in given)

    def bounds(self, num_keys: int, num_queries: int) -> tuple[Tensor, Tensor]:
        """Start and stop `[1 or B, N]` in 0 to M, equal where a row sees nothing; of one row if `uniform`."""
        width = 1 if self.uniform else num_queries
        parts = [None if x is None else x[..., :width] for x in (self.start, self.stop)]
        given = next(x for x in parts if x is not None)
        start = given.new_zeros(()) if parts[0] is None else parts[0].clamp(0, num_keys)
        stop = given.new_full((), num_keys) if parts[1] is None else parts[1].clamp(0, num_keys)
        start, stop = torch.broadcast_tensors(start, torch.maximum(start, stop))
        return start.view(-1, width), stop.view(-1, width)

    def valid(self, num_keys: int, num_queries: int) -> Tensor:
        """The first key in some row's interval, and the last + 1: int64 `[1 or B, 2]`; 0, 0 for none."""
        start, stop = (x.long() for x in self.bounds(num_keys, num_queries))
        sees = stop > start
        last = torch.where(sees, stop, 0).amax(-1)
        first = torch.minimum(torch.where(sees, start, num_keys).amin(-1), last)
        return torch.stack([first, last], -1)

    def pairs(self, num_keys: int, num_queries: int) -> int:
        """How many query-key pairs lie inside, over all items; it waits for their device once."""
        key = ("pairs", num_keys, num_queries)
        if key not in self.cache:
            start, stop = self.bounds(num_keys, num_queries)
            repeats = num_queries if self.uniform else 1
            self.cache[key] = int((stop.long() - start.long()).sum()) * repeats
        found = self.cache[key]
        assert isinstance(found, int)
        return found

    def to(self, device: torch.device | str) -> RowIntervals:
        """These on a device, made once for each."""
        device = torch.device(device)
        if all(x is None or x.device == device for x in (self.start, self.stop)):
            return self
        if device not in self.cache:
            moved = [None if x is None else x.to(device) for x in (self.start, self.stop)]
            self.cache[device] = RowIntervals(*moved)
        found = self.cache[device]
        assert isinstance(found, RowIntervals)
        return found

    def meet(self, other: RowIntervals) -> RowIntervals:
        """What both let through."""
        starts = [x for x in (self.start, other.start) if x is not None]
        stops = [x for x in (self.stop, other.stop) if x is not None]
        return RowIntervals(
            functools.reduce(torch.maximum, starts) if starts else None,
            functools.reduce(torch.minimum, stops) if stops else None,
        )


@functools.lru_cache(maxsize=256)
@on_cpu
def causal_rows(num_queries: int, num_keys: int, offset: int = 0) -> RowIntervals:
    """Causal order: row n sees keys up to `n + offset`. The same object for the same numbers.

    Args:
        num_queries, num_keys: N and M.
        offset: How many keys come before the first query: `M - N` for a prefill behind cached keys.
    """
    stop = torch.arange(1, num_queries + 1) + offset
    return RowIntervals(stop=stop.clamp(0, num_keys).int())


@functools.lru_cache(maxsize=64)
def causal_items(batch: int, tokens: int) -> RowIntervals:
    """Causal order of each item of a batch, `[B, N]`; the same object for the same numbers."""
    stop = causal_rows(tokens, tokens).stop
    assert stop is not None, "causal order ends somewhere"
    return RowIntervals(stop=stop.expand(batch, -1))


def valid_rows(lengths: Tensor, num_queries: int) -> RowIntervals:
    """Padding at the end: every row of batch item b sees keys before `lengths[b]`.

    Args:
        lengths: int `[B]`.
        num_queries: N.
    """
    return RowIntervals(stop=lengths.int()[:, None].expand(-1, num_queries))
