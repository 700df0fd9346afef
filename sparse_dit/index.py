"""SparseIndex: what an attention kernel executes, for one layer at one size.

Letters in shapes: B batch, H heads, N query tokens, M key tokens, G query groups, R key runs, C cells.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .density import density_in
from .entry import FarField, PatternIndex
from .intervals import RowIntervals
from .layout import Tile, TileOrder, TokenLayout, cut_offsets, tile_order
from .on_cpu import on_cpu
from .patterns import Pattern, Skip

MAX_GROUP = 128


@dataclass(frozen=True, eq=False)
class SparseIndex:
    """One layer's attention: which pattern index each head executes, in one launch.

    Args:
        entries: The distinct pattern indices.
        head_to_pattern: For each head its place in `entries`. A skipped head has an entry without runs
            and costs nothing.
        rows: What each row may see of all that, `[N]`, in token numbers before sorting; None for everything.
            What holds for one call alone is given to the call. A pooled key is seen if all its valid tokens
            are; see `docs/contract.md`.

    Attributes:
        cache: What backends made of this index; a copy starts with an empty one.
    """

    entries: tuple[PatternIndex, ...]
    head_to_pattern: tuple[int, ...]
    rows: RowIntervals | None = None
    cache: dict[object, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.entries or not self.head_to_pattern:
            raise ValueError("an index needs at least one head and one pattern")
        if not all(0 <= p < len(self.entries) for p in self.head_to_pattern):
            raise ValueError(f"head_to_pattern must name entries 0 to {len(self.entries) - 1}")
        if len({(e.num_queries, e.num_keys) for e in self.entries}) != 1:
            raise ValueError("all patterns of an index must have the same number of tokens")
        if self.rows is not None:
            self.rows.check((self.num_queries,))

    @property
    def num_heads(self) -> int:
        """H."""
        return len(self.head_to_pattern)

    @property
    def num_queries(self) -> int:
        """N."""
        return self.entries[0].num_queries

    @property
    def num_keys(self) -> int:
        """M."""
        return self.entries[0].num_keys

    @property
    def max_groups(self) -> int:
        """The largest G of the entries."""
        return max(entry.num_groups for entry in self.entries)

    @property
    def is_dense(self) -> bool:
        """Whether every head is dense."""
        return all(self.entries[p].is_dense for p in set(self.head_to_pattern))

    @functools.cached_property
    @on_cpu
    def head_density(self) -> Tensor:
        """float64 `[H]`: computed pairs over those of the dense kernel with the same `rows`."""
        rows = self.rows
        densities = [e.density if rows is None else density_in(e, rows) for e in self.entries]
        return torch.tensor([densities[p] for p in self.head_to_pattern], dtype=torch.float64)

    @functools.cached_property
    def density(self) -> float:
        """Mean density of the heads."""
        return self.head_density.mean().item()

    @functools.cached_property
    def heads_of(self) -> tuple[tuple[int, ...], ...]:
        """For each entry the heads that use it."""
        return tuple(
            tuple(h for h, p in enumerate(self.head_to_pattern) if p == entry)
            for entry in range(len(self.entries))
        )

    def to(self, device: torch.device | str) -> SparseIndex:
        """A copy with all tensors on `device`."""
        entries = tuple(entry.to(device) for entry in self.entries)
        return replace(self, entries=entries, rows=self.rows and self.rows.to(device))


def build_index(
    patterns: Sequence[Pattern],
    layout: TokenLayout,
    *,
    group: int = 64,
    rows: RowIntervals | None = None,
    sorted_by: Tile | None = None,
) -> SparseIndex:
    """Index of a self-attention layer over the tokens of `layout`.

    Pattern indices are interned: the same pattern at the same size is built once per process.

    Args:
        patterns: One for each head; of what is computed at some steps alone, the index is of those.
        layout: Segments of the sequence; it is the same for queries and keys.
        group: Largest number of query rows in a group, 1 to 128.
        rows: See `SparseIndex`; `causal_rows(n, n)` for causal order.
        sorted_by: The tile by which the sequence has been sorted already, as `tile_order` does it; None if
            it lies as `layout` says. Heads of this tile then have no order, and their runs are neighbours.

    Raises:
        ValueError: If there are no patterns, or `group` is out of range.
    """
    if not patterns:
        raise ValueError("an index needs one pattern for each head, got none")
    if not 1 <= group <= MAX_GROUP:
        raise ValueError(f"group must be 1 to {MAX_GROUP} rows, got {group}")
    patterns = [pattern.computed for pattern in patterns]
    distinct = list(dict.fromkeys(patterns))
    entries = tuple(pattern_index(pattern, layout, group, sorted_by) for pattern in distinct)
    heads = tuple(distinct.index(pattern) for pattern in patterns)
    return SparseIndex(entries, heads, rows)


def index_of(entries: Mapping[int, PatternIndex]) -> SparseIndex:
    """The index of heads' entries, by head from 0 on; those that share one share it in the index too."""
    distinct = list({id(entry): entry for entry in entries.values()}.values())
    places = {id(entry): place for place, entry in enumerate(distinct)}
    return SparseIndex(tuple(distinct), tuple(places[id(e)] for _, e in sorted(entries.items())))


@functools.lru_cache(maxsize=256)
@on_cpu
def dense_index(
    num_heads: int, num_queries: int, num_keys: int, device: torch.device
) -> SparseIndex:
    """Index of heads whose queries all see every key; the same object for the same arguments."""
    return SparseIndex((dense_entry(num_queries, num_keys),), (0,) * num_heads).to(device)


@functools.lru_cache(maxsize=64)
@on_cpu
def dense_entry(num_queries: int, num_keys: int) -> PatternIndex:
    """Every query sees every key: one group, one run, on the CPU; the same object for the same numbers."""
    rows, run = (torch.tensor([0, n], dtype=torch.int32) for n in (num_queries, num_keys))
    one = torch.tensor([0, 1], dtype=torch.int32)
    return PatternIndex(num_queries, num_keys, None, None, rows, one, run[None], None)


@functools.lru_cache(maxsize=1024)
@on_cpu
def pattern_index(
    pattern: Pattern, layout: TokenLayout, group: int = 64, sorted_by: Tile | None = None
) -> PatternIndex:
    """Index of one pattern at one size; see `build_index`."""
    n = layout.seq_len
    if pattern.computed.is_dense or layout.num_grid == 0:
        return dense_entry(n, n)
    if sorted_by is not None:
        places = tile_order(layout, sorted_by).order.argsort()
        return pattern_index(pattern, layout, group).placed(places)
    order = tile_order(layout, pattern.tile)
    cells = order.cell_offsets(pattern.cell)
    groups = groups_of(order, order.tile_offsets, group)
    return entry_of(seen_cells(pattern, order), order, cells, groups, pattern.far, pattern.pool)


def entry_of(
    exact: Tensor,
    order: TileOrder,
    cells: Tensor,
    groups: Groups,
    far: bool,
    pool: int | None = None,
) -> PatternIndex:
    """The entry of rows that see some cells exactly, the global tokens, and perhaps the rest pooled.

    Args:
        exact: Bool `[T, C]`: which cells of keys each owner of rows sees.
        order: The order of the tokens.
        cells: int64 `[C + 1]`, as of `TileOrder.cell_offsets`.
        groups: The rows, and which of the T each group belongs to; global ones see everything.
        far, pool: As of a `Pattern`.
    """
    n = len(order.order)
    bounds = cells + order.global_before
    runs, run_offsets = _merge(exact, bounds, _global_spans(order, n), groups.owner)
    pooled = _far_field(exact, bounds, groups.owner, pool) if far else None
    permutation = None if order.is_identity else order.order.int()
    return PatternIndex(
        n,
        n,
        permutation,
        permutation,
        groups.offsets.int(),
        run_offsets.int(),
        runs.int(),
        pooled,
    )


@on_cpu
def seen_cells(pattern: Pattern, order: TileOrder, places: Tensor | None = None) -> Tensor:
    """Which cells each tile sees exactly, bool `[tiles, cells]`; of some tiles, at `places`, int64 `[n]`."""
    cells, tiles = order.boxes(pattern.cell), order.boxes()
    if places is not None:
        tiles = tiles.at(places)
    step = max(1, (1 << 24) // max(1, len(cells)))
    parts = [
        pattern.shape.covers(tiles.slice(start, start + step), cells, order)
        for start in range(0, len(tiles), step)
    ]
    seen = torch.cat(parts)
    if pattern.sink_frames and not isinstance(pattern.shape, Skip):
        seen = seen | (cells.lo[:, 0] < pattern.sink_frames)
    return seen


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of sorted query rows.

    Args:
        offsets: int64 `[G + 1]`: sorted positions.
        owner: int64 `[G]`: the stretch of rows that each lies in; -1 for rows of global tokens.
    """

    offsets: Tensor
    owner: Tensor


def groups_of(order: TileOrder, stretches: Tensor, group: int = 64) -> Groups:
    """Each stretch of the grid's rows in equal parts of at most `group` rows; global ones apart (-1).

    Args:
        order: The order of the tokens.
        stretches: int64 `[T + 1]`, sorted positions as of `TileOrder.tile_offsets`.
        group: The largest number of rows.
    """
    starts, sizes = stretches[:-1], stretches.diff()
    parts = (sizes + group - 1) // group
    owner = torch.repeat_interleave(torch.arange(len(sizes)), parts)
    rank = torch.arange(len(owner)) - torch.repeat_interleave(parts.cumsum(0) - parts, parts)
    inside = starts[owner] + rank * sizes[owner] // parts[owner] + order.global_before
    end = stretches[-1].item() + order.global_before
    before = torch.arange(0, order.global_before, group)
    after = torch.arange(end, len(order.order), group)
    offsets = torch.cat([before, inside, after, torch.tensor([len(order.order)])])
    apart = [torch.full((len(part),), -1) for part in (before, after)]
    return Groups(offsets, torch.cat([apart[0], owner, apart[1]]))


def _global_spans(order: TileOrder, n: int) -> list[tuple[int, int]]:
    """Sorted positions of the global tokens: `(start, stop)` before and after the grid."""
    end = int(order.tile_offsets[-1]) + order.global_before
    return [(0, order.global_before), (end, n)]


def runs_of(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of true in each row of bool `[n, C]`: row, first and last + 1 of each run, in order."""
    edge = torch.nn.functional.pad(rows, (1, 1)).to(torch.int8).diff(dim=1)
    row, first = (edge == 1).nonzero(as_tuple=True)
    last = (edge == -1).nonzero(as_tuple=True)[1]
    return row, first, last


def _merge(
    exact: Tensor, cells: Tensor, spans: list[tuple[int, int]], owner: Tensor
) -> tuple[Tensor, Tensor]:
    """Key runs of every group: global keys and the cells its tile sees; global rows see everything."""
    (_, before), (after, n) = spans
    row, first, last = runs_of(exact)
    start, stop = cells[first], cells[last]
    tiles = torch.arange(exact.shape[0])
    if before:
        row, start, stop = (
            torch.cat([row, tiles]),
            _front(start, tiles, 0),
            _front(stop, tiles, before),
        )
    if after < n:
        row = torch.cat([row, tiles])
        start, stop = _front(start, tiles, after), _front(stop, tiles, n)
    rank = (row * (n + 1) + start).argsort()
    row, start, stop = row[rank], start[rank], stop[rank]
    fresh = torch.ones(len(row), dtype=torch.bool)
    fresh[1:] = (row[1:] != row[:-1]) | (start[1:] != stop[:-1])
    ends = torch.cat([fresh[1:], torch.ones(1, dtype=torch.bool)])[: len(row)]
    row, start, length = row[fresh], start[fresh], stop[ends] - start[fresh]
    counts = torch.bincount(row, minlength=len(tiles))
    pick, offsets = _spread(counts, owner, len(row))
    table = torch.cat([torch.stack([start, length], 1), torch.tensor([[0, n]])])
    return table[pick], offsets


def _front(values: Tensor, tiles: Tensor, value: int) -> Tensor:
    return torch.cat([values, torch.full_like(tiles, value)])


def _spread(counts: Tensor, owner: Tensor, extra: int) -> tuple[Tensor, Tensor]:
    """Row lists of tiles as row lists of groups: indices into the tiles' rows, and CSR offsets.

    Groups without a tile (-1) get the one row numbered `extra`.
    """
    starts = torch.cat([counts.cumsum(0) - counts, torch.tensor([extra])])
    sizes = torch.cat([counts, torch.ones(1, dtype=torch.int64)])
    per_group = sizes[owner]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), per_group.cumsum(0)])
    rank = torch.arange(offsets[-1].item()) - torch.repeat_interleave(offsets[:-1], per_group)
    return torch.repeat_interleave(starts[owner], per_group) + rank, offsets


def _far_field(exact: Tensor, cells: Tensor, owner: Tensor, pool: int | None) -> FarField:
    """Pooled form of all cells that a group's tile doesn't see, in pools of at most so many tokens.

    Global rows see everything exactly.
    """
    row, first, last = runs_of(~exact)
    if pool is not None:
        pools = cut_offsets(cells, pool)
        number = torch.searchsorted(pools, cells)
        first, last, cells = number[first], number[last], pools
    counts = torch.bincount(row, minlength=exact.shape[0])
    runs = torch.stack([first, last - first], 1)
    keep = owner >= 0
    pick, offsets = _spread(counts, owner.clamp_min(0), len(row))
    sizes = offsets.diff()
    wanted = torch.repeat_interleave(keep, sizes)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (sizes * keep).cumsum(0)])
    return FarField(cells.int(), offsets.int(), runs[pick[wanted]].int())
