"""How many query-key pairs an index computes inside of row intervals, counted without a loop over groups."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cells import valid_cells
from .entry import PatternIndex, expand
from .intervals import RowIntervals
from .on_cpu import on_cpu

CHUNK = 1 << 15  # pairs of a group and a cell compared at once, each for all rows of the group


@on_cpu
def density_in(entry: PatternIndex, rows: RowIntervals) -> float:
    """Pairs that an entry computes in `rows` (a pooled key counts as one) over all pairs in them."""
    entry = entry.to("cpu")
    start, stop = (
        x.expand(1, entry.num_queries)[0].long()
        for x in rows.to("cpu").bounds(entry.num_keys, entry.num_queries)
    )
    total = (stop - start).sum().item()
    if not total:
        return 0.0
    start, stop = start[entry.query_tokens], stop[entry.query_tokens]  # of sorted rows
    group = torch.repeat_interleave(torch.arange(entry.num_groups), entry.q_offsets.diff().long())
    lists = _lists(entry)
    pairs = (lists.below(group, stop) - lists.below(group, start)).sum().item()
    if entry.far is not None:
        valid = rows.to("cpu").valid(entry.num_keys, entry.num_queries)[0]
        pairs += _cells_seen(entry, start, stop, valid)
    return pairs / total


class _Lists(NamedTuple):
    """Runs of key tokens, ascending in each group; `offsets` `[G + 1]` is where groups begin."""

    starts: Tensor
    lengths: Tensor
    offsets: Tensor
    limit: int

    def below(self, group: Tensor, token: Tensor) -> Tensor:
        """How many keys of each `group` lie before each `token`."""
        owner = torch.repeat_interleave(torch.arange(len(self.offsets) - 1), self.offsets.diff())
        places = owner * (self.limit + 1) + self.starts
        at = torch.searchsorted(places, group * (self.limit + 1) + token)
        count = torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0))
        some = at > self.offsets[group]
        ends = torch.nn.functional.pad(self.starts + self.lengths, (1, 0))[at]  # of the run before
        beyond = torch.where(some, ends - token, 0).clamp_min(0)
        return count[at] - count[self.offsets[group]] - beyond


def _lists(entry: PatternIndex) -> _Lists:
    """What each group sees exactly: its runs, or, where keys are sorted otherwise, its tokens in order."""
    offsets, runs = entry.run_offsets.long(), entry.runs.long()
    if entry.k_order is None:
        return _Lists(runs[:, 0], runs[:, 1], offsets, entry.num_keys)
    owner = torch.repeat_interleave(torch.arange(entry.num_groups), offsets.diff())
    owner = torch.repeat_interleave(owner, runs[:, 1])
    tokens = entry.key_tokens[expand(runs)]
    sorted_places = (owner * (entry.num_keys + 1) + tokens).sort().values
    sizes = torch.nn.functional.pad(entry.group_keys.cumsum(0), (1, 0))
    return _Lists(
        sorted_places % (entry.num_keys + 1), torch.ones_like(tokens), sizes, entry.num_keys
    )


def _cells_seen(entry: PatternIndex, start: Tensor, stop: Tensor, valid: Tensor) -> int:
    """Pairs of a row and a pooled key whose valid tokens it may all see; bounds are those of sorted rows."""
    assert entry.far is not None, "only entries with a far field have cells"
    cells = valid_cells(entry, valid)
    groups = torch.repeat_interleave(torch.arange(entry.num_groups), entry.group_cells)
    listed = expand(entry.far.runs)
    begin, sizes = entry.q_offsets[:-1].long(), entry.q_offsets.diff().long()
    rank = torch.arange(int(sizes.max()))
    seen = 0
    for at in range(0, len(listed), CHUNK):
        group, cell = groups[at : at + CHUNK], listed[at : at + CHUNK, None]
        row = (begin[group, None] + rank).clamp_max(entry.num_queries - 1)
        inside = (start[row] <= cells.first[cell]) & (stop[row] > cells.last[cell])
        inside &= (rank < sizes[group, None]) & (cells.size[cell] > 0)
        seen += int(inside.sum())
    return seen
