"""A pattern index as the Triton kernels read it: tiles of query rows, and the steps each works through.

A tile is up to `block_m` sorted rows that see the same keys: a query group, or neighbouring groups with
equal lists together. So no step needs a mask by row, except for row intervals. A step is `block_n` places
in a table of key tokens: first the sorted keys themselves, where whole pieces of runs lie, then what
remains of each list's runs, packed together; -1 fills the last step of a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...index import PatternIndex
from ...intervals import RowIntervals
from ...on_cpu import on_cpu

TILE_FIELDS = 8  # first row, rows, first step, first masked step, end; first cell step, end; group
# addresses: tiles, queries, keys, steps, cells, cell steps; pooled row; positions, lasts
HEAD_FIELDS = 9
SLOT_FIELDS = 5  # addresses: keys, cell offsets; cells, first pooled row, key head
TILE_BITS = 20
TILE_STEPS = 2  # what a tile costs besides its steps, in steps: loading queries, writing the output


@dataclass(frozen=True, eq=False)
class Tables:
    """One pattern's tables, int32 on one device. Letters: T tiles, S steps, P places.

    Args:
        tiles: `[T, TILE_FIELDS]`.
        q_tokens: `[N]`, the token at each sorted position.
        keys: `[P]`, key tokens, -1 where there is none.
        positions: `[P]`, the sorted positions of these keys.
        steps: `[S]`, first places in `keys`.
        lasts: `[S]`, the largest key token of each step; a list's full steps are sorted by it.
        cells: Cell numbers, like `keys`.
        cell_steps: First places in `cells`.
        cell_offsets: The far field's, or empty.
        cost: float64 `[T]` on the CPU: steps of each tile, and `TILE_STEPS`.
    """

    tiles: Tensor
    q_tokens: Tensor
    keys: Tensor
    positions: Tensor
    steps: Tensor
    lasts: Tensor
    cells: Tensor
    cell_steps: Tensor
    cell_offsets: Tensor
    cost: Tensor


def tables_of(
    entry: PatternIndex,
    block_m: int,
    block_n: int,
    *,
    rows: RowIntervals | None = None,
    by_group: bool = False,
) -> Tables:
    """Tables of `entry` on its device, made once.

    Args:
        entry: The pattern index.
        block_m, block_n: Rows of a tile and keys of a step.
        rows: The index's own intervals, on any device; steps that no row of a tile sees are left out.
        by_group: Don't join groups: block mass is counted by group.
    """
    name = ("triton", block_m, block_n, rows, by_group)
    tables = entry.cache.get(name)
    if not isinstance(tables, Tables):
        tables = _build(entry.to("cpu"), block_m, block_n, rows and rows.to("cpu"), by_group)
        device = entry.q_offsets.device
        moved = {k: v.to(device) for k, v in vars(tables).items() if k != "cost"}
        entry.cache[name] = tables = Tables(**moved, cost=tables.cost)
    return tables


class _Steps(NamedTuple):
    """Steps of lists: first places `[S]`, more positions `[X]` behind the first, bounds `[L, 3]`."""

    places: Tensor
    extra: Tensor
    bounds: Tensor


@on_cpu
def _build(
    entry: PatternIndex, block_m: int, block_n: int, within: RowIntervals | None, by_group: bool
) -> Tables:
    first = torch.arange(entry.num_groups) if by_group else bands(entry)
    start = entry.q_offsets.long()[first]
    end = torch.cat([start[1:], entry.q_offsets.long()[-1:]])
    parts = (end - start + block_m - 1) // block_m
    owner, rank = ranks(parts)
    row = start[owner] + rank * block_m
    rows = torch.minimum(end[owner] - row, torch.tensor(block_m))
    exact = _steps(*lists_of(entry.runs, entry.run_offsets, first), entry.num_keys, block_n)
    positions = _table(entry.num_keys, exact, block_n)
    keys = torch.where(positions < 0, -1, entry.key_tokens[positions.clamp_min(0)])
    far, cells, cell_offsets = _far_steps(entry, first, block_n)
    places, lasts = _sorted_by_last(exact, keys, block_n)
    bounds = exact.bounds[owner]
    if within is not None:
        extents = extents_of(entry, within, row, rows)
        kept, bounds = _within(places, lasts, bounds, keys, extents, block_n)
        places, lasts = places[kept], lasts[kept]
    tiles = torch.cat(
        [row[:, None], rows[:, None], bounds, far.bounds[owner][:, ::2], first[owner][:, None]], 1
    )
    cost = bounds[:, 2] - bounds[:, 0] + far.bounds[owner][:, 2] - far.bounds[owner][:, 0]
    return Tables(
        tiles.int(),
        entry.query_tokens.int(),
        keys.int(),
        positions.int(),
        _some(places).int(),
        _some(lasts).int(),
        cells.int(),
        _some(far.places).int(),
        cell_offsets.int(),
        cost.double() + TILE_STEPS,
    )


def bands(entry: PatternIndex) -> Tensor:
    """First groups of neighbours that see the same, exactly and pooled."""
    fresh = _differs(entry.runs, entry.run_offsets)
    if entry.far is not None:
        fresh |= _differs(entry.far.runs, entry.far.run_offsets)
    return fresh.nonzero()[:, 0]


def _differs(runs: Tensor, offsets: Tensor) -> Tensor:
    """bool `[G]`: whether a group's runs aren't those of the group before it."""
    counts = offsets.long().diff()
    fresh = torch.ones(len(counts), dtype=torch.bool)
    fresh[1:] = counts[1:] != counts[:-1]
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    place = torch.arange(len(runs))
    other = (runs != runs[(place - counts[owner]).clamp_min(0)]).any(1)
    fresh[owner[other]] = True
    return fresh


def lists_of(runs: Tensor, offsets: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The runs of some groups, int64, and how many each has."""
    offsets = offsets.long()
    counts = offsets.diff()[groups]
    of, rank = ranks(counts)
    return runs.long()[offsets[groups][of] + rank], counts


def _steps(runs: Tensor, counts: Tensor, length: int, block: int) -> _Steps:
    """Steps of lists of runs over a table that begins with `length` sorted positions."""
    size = _padded(length, block)
    lists = torch.arange(len(counts))
    owner = torch.repeat_interleave(lists, counts)
    start, whole, rest = runs[:, 0], runs[:, 1] // block, runs[:, 1] % block
    direct = torch.zeros(len(counts), dtype=torch.int64).index_add_(0, owner, whole)
    left = torch.zeros(len(counts), dtype=torch.int64).index_add_(0, owner, rest)
    packed = (left + block - 1) // block
    total = direct + packed
    low = total.cumsum(0) - total
    begin = packed.cumsum(0) - packed
    places = torch.empty(int(total.sum()), dtype=torch.int64)
    of, rank = ranks(whole)
    places[low[owner[of]] + _rank_in(direct, owner[of])] = start[of] + rank * block
    of, rank = ranks(packed)
    places[low[of] + direct[of] + rank] = size + (begin[of] + rank) * block
    extra = torch.full((int(packed.sum()) * block,), -1)
    of, rank = ranks(rest)
    extra[begin[owner[of]] * block + _rank_in(left, owner[of])] = (
        start[of] + whole[of] * block + rank
    )
    return _Steps(places, extra, torch.stack([low, low + direct + left // block, low + total], 1))


def ranks(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For `counts[i]` items of each i: i, and the item's rank."""
    of = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return of, torch.arange(len(of)) - (counts.cumsum(0) - counts)[of]


def _rank_in(counts: Tensor, owner: Tensor) -> Tensor:
    """Ranks of items in their lists; items come in the order of lists."""
    return torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]


def _padded(length: int, block: int) -> int:
    return -(-length // block) * block


def _table(length: int, steps: _Steps, block: int) -> Tensor:
    """Positions at each place: all sorted ones, and the packed ones; -1 where there is none."""
    direct = torch.full((_padded(max(1, length), block),), -1)
    direct[:length] = torch.arange(length)
    return torch.cat([direct, steps.extra])


def _far_steps(entry: PatternIndex, first: Tensor, block: int) -> tuple[_Steps, Tensor, Tensor]:
    """Steps over cells, the table of cells, and the offsets of cells."""
    if entry.far is None:
        none = torch.zeros(1, dtype=torch.int64)
        bounds = torch.zeros(len(first), 3, dtype=torch.int64)
        return _Steps(none, none, bounds), torch.full((block,), -1), none[:0]
    far = entry.far
    count = len(far.cell_offsets) - 1
    steps = _steps(*lists_of(far.runs, far.run_offsets, first), count, block)
    return steps, _table(count, steps, block), far.cell_offsets


class Extents(NamedTuple):
    """Keys that all rows of each tile may see, and that any may, `[T]`: the first, and the last + 1."""

    all_start: Tensor
    all_stop: Tensor
    any_start: Tensor
    any_stop: Tensor


def extents_of(entry: PatternIndex, within: RowIntervals, row: Tensor, rows: Tensor) -> Extents:
    """The extents of tiles that begin at sorted rows `row` and have so many `rows`."""
    of, rank = ranks(rows)
    token = entry.query_tokens[row[of] + rank]
    bounds = within.bounds(entry.num_keys, entry.num_queries)
    start, stop = (x.expand(1, entry.num_queries)[0, token].long() for x in bounds)
    none = stop <= start

    def reduced(values: Tensor, how: str, first: int) -> Tensor:
        return torch.full((len(row),), first).scatter_reduce_(0, of, values, how)

    return Extents(
        reduced(start, "amax", 0),
        reduced(torch.where(none, 0, stop), "amin", entry.num_keys),
        reduced(torch.where(none, entry.num_keys, start), "amin", entry.num_keys),
        reduced(torch.where(none, 0, stop), "amax", 0),
    )


def _sorted_by_last(steps: _Steps, keys: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """First places and largest keys of steps, each list's full ones sorted by these."""
    last = keys[steps.places[:, None] + torch.arange(block)].amax(1)
    low, part, high = steps.bounds.unbind(1)
    of, rank = ranks(high - low)
    order = last.argsort(stable=True)
    order = order[(of * 2 + (low[of] + rank >= part[of]))[order].argsort(stable=True)]
    return steps.places[order], last[order]


def _within(
    places: Tensor, largest: Tensor, bounds: Tensor, keys: Tensor, extents: Extents, block: int
) -> tuple[Tensor, Tensor]:
    """Lists of steps for each tile: those that all rows see wholly, then those seen in part; no others."""
    mine = keys[places[:, None] + torch.arange(block)]
    smallest = torch.where(mine < 0, len(keys), mine).amin(1)
    low, masked, high = bounds.unbind(1)
    tile, rank = ranks(high - low)
    step = low[tile] + rank
    all_start, all_stop, any_start, any_stop = (x[tile] for x in extents)
    whole = (step < masked[tile]) & (smallest[step] >= all_start) & (largest[step] < all_stop)
    part = ~whole & (smallest[step] < any_stop) & (largest[step] >= any_start)
    kept = whole | part
    tile, step, part = tile[kept], step[kept], part[kept]
    order = (tile * 2 + part).argsort(stable=True)
    full = torch.bincount(tile[~part], minlength=len(low))
    count = torch.bincount(tile, minlength=len(low))
    begin = count.cumsum(0) - count
    return step[order], torch.stack([begin, begin + full, begin + count], 1)


def _some(places: Tensor) -> Tensor:
    """At least one: a kernel has no use for the address of nothing."""
    return places if len(places) else places.new_zeros(1)
