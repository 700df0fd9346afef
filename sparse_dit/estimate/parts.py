"""Entries put together from others: by the rows' modality, by the keys', and of one's own part.

MMInference's boundaries (https://arxiv.org/abs/2504.16083) without its permutations: a group holds rows of
one modality alone, and its runs are those of that modality's entry. Letters: N rows, M keys, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..entry import PatternIndex, expand
from ..modalities import Modalities
from .rows import CallRows
from .runs import GROUP


def by_rows(parts: Sequence[PatternIndex], owner: Tensor) -> PatternIndex:
    """An entry each of whose rows sees what it sees in one of several.

    Args:
        parts: Entries of the same size, of tokens in their place.
        owner: int64 `[N]`: for each row its part.
    """
    n = len(owner)
    change = torch.nn.functional.pad(owner[1:] != owner[:-1], (1, 0), value=True)
    for number, part in enumerate(parts):
        cuts = part.q_offsets[:-1].long()
        change[cuts[owner[cuts] == number]] = True
    bounds = _bounds(change)
    runs, offsets, shift = [], torch.zeros(len(bounds) - 1, 2, dtype=torch.int64), 0
    for number, part in enumerate(parts):
        mine = owner[bounds[:-1]] == number
        offsets[mine] = _lists(part, bounds[:-1][mine]) + torch.tensor([shift, 0])
        runs.append(part.runs)
        shift += len(part.runs)
    ends = torch.nn.functional.pad(offsets[:, 1].cumsum(0), (1, 0))
    picked = torch.cat(runs)[expand(offsets)]
    return PatternIndex(n, parts[0].num_keys, None, None, bounds.int(), ends.int(), picked)


def by_keys(
    parts: Sequence[PatternIndex],
    owner: Tensor,
    numbers: Sequence[int],
    rows: Tensor | None = None,
) -> PatternIndex:
    """An entry that sees what each of several sees of keys of its own.

    Args:
        parts: Entries of the same size, of tokens in their place.
        owner: int64 `[M]`: for each key a number.
        numbers: The number of each part's keys.
        rows: Bool `[N]`: rows that are wanted, others may see nothing; None for all.
    """
    n, m = parts[0].num_queries, parts[0].num_keys
    change = torch.zeros(n, dtype=torch.bool)
    for part in parts:
        change[part.q_offsets[:-1].long()] = True
    bounds = _bounds(change)
    edge = torch.nn.functional.pad(owner[1:] != owner[:-1], (1, 1), value=True).nonzero()[:, 0]
    wanted = torch.ones(len(bounds) - 1, dtype=torch.bool)
    if rows is not None:
        before = torch.nn.functional.pad(rows.cumsum(0), (1, 0))[bounds]
        wanted = before.diff() > 0
    groups, starts, stops = [], [], []
    for part, number in zip(parts, numbers, strict=True):
        lists = _lists(part, bounds[:-1])
        lists[~wanted, 1] = 0
        group = torch.repeat_interleave(torch.arange(len(lists)), lists[:, 1])
        start, length = part.runs[expand(lists)].long().T.contiguous()
        first = torch.searchsorted(edge, start, right=True) - 1  # of the stretches of keys it meets
        count = torch.searchsorted(edge, start + length) - first
        run = torch.repeat_interleave(torch.arange(len(start)), count)
        span = expand(torch.stack([first, count], 1))
        mine = owner[edge[span]] == number
        run, span = run[mine], span[mine]
        groups.append(group[run])
        starts.append(start[run].maximum(edge[span]))
        stops.append((start + length)[run].minimum(edge[span + 1]))
    return _merged(torch.cat(groups), torch.cat(starts), torch.cat(stops), bounds, (n, m))


def own_part(modalities: Modalities, call: CallRows, stop: Tensor, sinks: int) -> PatternIndex:
    """Each row sees the image, frame or stretch of text that it is in, and each sequence's first keys.

    Args:
        modalities, call, stop: As for `part_entry`.
        sinks: How many first keys of each sequence.
    """
    return part_entry(modalities, call, stop, call.sinks(sinks).nonzero()[:, 0])


def part_entry(modalities: Modalities, call: CallRows, stop: Tensor, first: Tensor) -> PatternIndex:
    """Each row sees the image, frame or stretch of text that it is in, and some keys.

    Args:
        modalities: Where they lie among the M keys.
        call: All rows.
        stop: int32 `[N]`: what each row sees ends there at most.
        first: int64 `[S]`: keys that all later rows see.
    """
    n, m = call.rows.shape[1], call.num_keys
    edge = torch.tensor([part.start for part in modalities.parts] + [m])
    change = torch.zeros(n, dtype=torch.bool)
    inside = edge[(edge >= call.offset) & (edge < m)] - call.offset
    change[inside] = True
    bounds = _bounds(change)
    count = len(bounds) - 1
    group = torch.repeat_interleave(torch.arange(count), bounds.diff())
    last = torch.zeros(count, dtype=torch.int64).scatter_reduce_(0, group, stop.long(), "amax")
    part = torch.searchsorted(edge, bounds[:-1] + call.offset, right=True) - 1
    every = torch.arange(count)
    groups = torch.cat([every, every.repeat_interleave(len(first))])
    starts = torch.cat([edge[part], first.repeat(count)])
    stops = torch.cat([edge[part + 1], first.repeat(count) + 1]).minimum(last[groups])
    return _merged(groups, starts, stops, bounds, (n, m))


def _bounds(change: Tensor) -> Tensor:
    """int64 `[G + 1]`: groups of at most 64 rows, from bool `[N]`: whether one must begin there."""
    change = change.clone()
    change[::GROUP] = True
    return torch.nn.functional.pad(change, (0, 1), value=True).nonzero()[:, 0]


def _lists(part: PatternIndex, rows: Tensor) -> Tensor:
    """int64 `[R, 2]`: where the runs of the groups begin that hold some rows, and how many they are."""
    group = torch.searchsorted(part.q_offsets.long(), rows, right=True) - 1
    first = part.run_offsets[group].long()
    return torch.stack([first, part.run_offsets[group + 1].long() - first], 1)


def _merged(
    group: Tensor, start: Tensor, stop: Tensor, bounds: Tensor, size: tuple[int, int]
) -> PatternIndex:
    """An entry of runs in any order that may meet or overlap; empty ones are left out."""
    n, m = size
    real = stop > start
    group, start, stop = group[real], start[real], stop[real]
    base = group * (m + 1)  # runs of one group don't meet those of the next
    order = (base + start).argsort()
    begin, end = (base + start)[order], (base + stop)[order].cummax(0).values
    fresh = torch.nn.functional.pad(begin[1:] > end[:-1], (1, 0), value=True)[: len(begin)]
    ends = torch.nn.functional.pad(fresh[1:], (0, 1), value=True)[: len(begin)]
    begin, end = begin[fresh], end[ends]
    runs = torch.stack([begin % (m + 1), end - begin], 1).int()
    counts = torch.bincount(begin // (m + 1), minlength=len(bounds) - 1)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    return PatternIndex(n, m, None, None, bounds.int(), offsets, runs)
