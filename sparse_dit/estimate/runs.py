"""Pattern indices of chosen columns and diagonals: groups of 64 rows, and the key runs that each sees.

Letters in shapes: L heads, N query tokens, M key tokens, C bins of 64 offsets, G groups, R key runs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..backends.cpu import estimates, library
from ..backends.cpu.estimates import BIN, GROUP
from ..entry import PatternIndex
from ..index import runs_of
from ..on_cpu import on_cpu


def slash_entries(chosen: Tensor, num_queries: int, num_keys: int) -> list[PatternIndex]:
    """An index for each head: what it sees up to each group's last row, in causal order.

    A group sees a bin's keys of all its rows, so each row up to 63 more on either side.

    Args:
        chosen: Bool `[L, M + C]`: columns, then bins. A row's own key is seen if bin 0 is chosen.
        num_queries, num_keys: N and M; the rows are the last N tokens.
    """
    lay = runs_by_torch if library.LIBRARY is None else estimates.lay_runs
    offsets, runs = lay(chosen, num_queries, num_keys)
    return entries_of(offsets, runs, num_queries, num_keys)


def entries_of(
    offsets: Tensor, runs: Tensor, num_queries: int, num_keys: int
) -> list[PatternIndex]:
    """Entries from int32 `[L, G + 1]` and `[R, 2]`: one head's runs after another's."""
    bounds = group_bounds(num_queries)
    parts = runs.split(offsets[:, -1].tolist())
    return [
        PatternIndex(num_queries, num_keys, None, None, bounds, mine, part)
        for mine, part in zip(offsets, parts, strict=True)
    ]


@functools.lru_cache(maxsize=64)
@on_cpu
def group_bounds(num_queries: int) -> Tensor:
    """int32 `[G + 1]`: groups of 64 rows, the last one shorter."""
    groups = -(-num_queries // GROUP)
    return (torch.arange(groups + 1) * GROUP).clamp_max(num_queries).int()


@on_cpu
def runs_by_torch(chosen: Tensor, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor]:
    """int32 `[L, G + 1]` and `[R, 2]` by PyTorch, where the kernel's library is missing."""
    offsets, runs = zip(
        *(_runs_of_head(head, num_queries, num_keys) for head in chosen), strict=True
    )
    return torch.stack(offsets).int(), torch.cat(runs).int()


def _runs_of_head(chosen: Tensor, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor]:
    bounds = group_bounds(num_queries).long() + num_keys - num_queries
    own, stop = bounds[:-1, None], bounds[1:, None]
    _, first, last = runs_of(chosen[None, :num_keys])
    _, near, far = runs_of(chosen[None, num_keys:])
    start = torch.cat([first.expand(len(own), -1), own - far * BIN], 1).clamp_min(0)
    end = torch.cat([last.expand(len(own), -1), own - (near - 1) * BIN], 1).minimum(stop)
    start = torch.where(start < end, start, num_keys + 1)  # none: behind all others
    start, order = start.sort(1)
    end = end.gather(1, order).cummax(1).values
    real = start <= num_keys
    before = torch.nn.functional.pad(end[:, :-1], (1, 0), value=-1)
    fresh = (start > before) & real
    ends = torch.nn.functional.pad(fresh[:, 1:] | ~real[:, 1:], (0, 1), value=True) & real
    offsets = torch.nn.functional.pad(fresh.sum(1).cumsum(0), (1, 0))
    return offsets, torch.stack([start[fresh], end[ends] - start[fresh]], 1)
