"""A part of an index: the queries and keys that one of several devices holds, or a run of queries."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .index import FarField, PatternIndex, SparseIndex
from .intervals import RowIntervals
from .on_cpu import on_cpu


@on_cpu
def cut(entry: PatternIndex, queries: Tensor, keys: Tensor) -> PatternIndex:
    """What `entry` computes between some queries and some keys, for tensors that hold only those.

    Pooled cells that lie half inside are pooled over the half that does, so that parts of a far field
    put together pool more finely than the whole where cells were cut. Kept in `entry.cache`.

    Args:
        entry: The whole index.
        queries, keys: int64 `[n]`, `[m]`: tokens in the order in which the tensors hold them, each
            once.

    Returns:
        An index of n queries and m keys on the device of `entry`.
    """
    every = len(queries) == entry.num_queries and len(keys) == entry.num_keys
    if every and _in_place(queries) and _in_place(keys):
        return entry
    name = ("cut", _digest(queries), _digest(keys))
    if name not in entry.cache:
        entry.cache[name] = _cut(entry.to("cpu"), queries, keys).to(entry.q_offsets.device)
    found = entry.cache[name]
    assert isinstance(found, PatternIndex)
    return found


def slice_queries(index: SparseIndex, start: int, stop: int) -> SparseIndex:
    """What an index computes for the queries from `start` to before `stop`, and all keys.

    A slice of the groups: it costs a few small tensors, and nothing is kept.

    Args:
        index: Its queries stay in place (no entry has a `q_order`).
        start, stop: Query tokens, the chunk that the call's q holds.

    Raises:
        ValueError: If the slice is empty or goes beyond the queries, or queries are sorted otherwise.
    """
    if not 0 <= start < stop <= index.num_queries:
        raise ValueError(
            f"a slice must lie in 0 to {index.num_queries} queries, got {start} to {stop}"
        )
    if any(entry.q_order is not None for entry in index.entries):
        raise ValueError(
            "queries must stay in place to be sliced; use cut for an order of their own"
        )
    bounds = (None, None) if index.rows is None else (index.rows.start, index.rows.stop)
    sliced = [None if x is None else x[start:stop] for x in bounds]
    entries = tuple(slice_entry(entry, start, stop) for entry in index.entries)
    return SparseIndex(entries, index.head_to_pattern, index.rows and RowIntervals(*sliced))


def slice_entry(entry: PatternIndex, start: int, stop: int) -> PatternIndex:
    """As `slice_queries`, of one entry whose queries stay in place."""
    first = int((entry.q_offsets <= start).sum()) - 1
    end = int((entry.q_offsets < stop).sum())
    far = entry.far
    if far is not None:
        far = FarField(far.cell_offsets, *_some_groups(far.run_offsets, far.runs, first, end))
    offsets, runs = _some_groups(entry.run_offsets, entry.runs, first, end)
    q_offsets = entry.q_offsets[first : end + 1].clamp(start, stop) - start
    return PatternIndex(
        stop - start, entry.num_keys, None, entry.k_order, q_offsets, offsets, runs, far
    )


def _some_groups(offsets: Tensor, runs: Tensor, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Offsets and runs of the groups from `first` to before `end`."""
    begin, stop = offsets[first].item(), offsets[end].item()
    return offsets[first : end + 1] - begin, runs[int(begin) : int(stop)]


def _digest(tokens: Tensor) -> bytes:
    return hashlib.sha256(tokens.numpy().tobytes()).digest()


def _cut(entry: PatternIndex, queries: Tensor, keys: Tensor) -> PatternIndex:
    q_order, rows_below = _kept(entry.query_tokens, queries)
    k_order, keys_below = _kept(entry.key_tokens, keys)
    bounds = rows_below[entry.q_offsets.long()]
    used = bounds.diff() > 0
    far = None
    if entry.far is not None:
        cells = keys_below[entry.far.cell_offsets.long()]
        number = torch.nn.functional.pad((cells.diff() > 0).long().cumsum(0), (1, 0))
        far_offsets, far_runs = _runs(entry.far.run_offsets, entry.far.runs, number, used)
        if len(far_runs):
            far = FarField(cells.unique().int(), far_offsets.int(), far_runs.int())
    offsets, runs = _runs(entry.run_offsets, entry.runs, keys_below, used)
    return PatternIndex(
        len(queries),
        len(keys),
        None if _in_place(q_order) else q_order.int(),
        None if _in_place(k_order) else k_order.int(),
        torch.cat([bounds[:1], bounds[1:][used]]).int(),
        offsets.int(),
        runs.int(),
        far,
    )


def _kept(order: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted positions that are kept, as places in `tokens`; and how many are before each position."""
    place = torch.full((len(order),), -1, dtype=torch.int64)
    place[tokens] = torch.arange(len(tokens))
    places = place[order]
    below = torch.nn.functional.pad((places >= 0).long().cumsum(0), (1, 0))
    return places[places >= 0], below


def _runs(offsets: Tensor, runs: Tensor, below: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Runs of the used groups in new numbers: empty ones dropped, those that now touch joined."""
    owner = torch.repeat_interleave(torch.arange(len(used)), offsets.diff().long())
    start, stop = below[runs[:, 0].long()], below[runs.long().sum(1)]
    keep = used[owner] & (stop > start)
    owner, start, stop = owner[keep], start[keep], stop[keep]
    fresh = torch.ones(len(owner), dtype=torch.bool)
    fresh[1:] = (owner[1:] != owner[:-1]) | (start[1:] != stop[:-1])
    last = torch.cat([fresh[1:], torch.ones(1, dtype=torch.bool)])[: len(owner)]
    joined = torch.stack([start[fresh], stop[last] - start[fresh]], 1)
    counts = torch.bincount(owner[fresh], minlength=len(used))[used]
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)), joined


def _in_place(order: Tensor) -> bool:
    return torch.equal(order, torch.arange(len(order)))
