"""An index before its blocks are chosen: what is made once on the host for a layout, and kept."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...index import PatternIndex
from ...on_cpu import on_cpu
from .chosen import Places
from .config import Config
from .grids import Grid, grid_of, padded
from .slots import Slots
from .tables import HEAD_FIELDS, TILE_BITS, TILE_FIELDS, tables_of
from .work import SMALL_TILE, addresses_of

ALIGNED = 4  # integers, of 16 bytes together


class Part(NamedTuple):
    """Heads whose blocks lie alike. Places are of int32 in one piece of memory.

    Args:
        grid: Their tables that no choice changes.
        heads: Which heads.
        keys, tiles, steps, cells: Places of tables that a choice makes.
        lasts: That of the largest key token of each step; None if rows have no intervals.
        first_item: The first of the tiles in the order of all heads.
    """

    grid: Grid
    heads: tuple[int, ...]
    keys: int
    tiles: int
    steps: int
    cells: int
    lasts: int | None
    first_item: int


@dataclass(frozen=True, eq=False)
class Frame:
    """An index without what is chosen, for a number of key heads and a configuration.

    Args:
        config: Block sizes, warps and stages.
        parts: Heads whose blocks are chosen on the device.
        size: int32 that the tables of all choices take.
        fields: int64 `[H, HEAD_FIELDS]`: addresses of tables, or bytes from where those of choices begin.
        chosen: int64 `[H, HEAD_FIELDS]`: 1 where they are such bytes.
        slots, cells, pooled_rows: As of `Work`.
        items: int32 `[items]`: `head << TILE_BITS | tile`, by parts, then the other heads.
        cost: float64 `[items]`: of the other heads; 0 for tiles whose steps are chosen.
        pairs: Query-key pairs of the other heads.
        partial: Whether many steps may be of fewer keys.
        tables: Keeps what is pointed to.
    """

    config: Config
    parts: tuple[Part, ...]
    size: int
    fields: Tensor
    chosen: Tensor
    slots: Tensor
    cells: int
    pooled_rows: int
    items: Tensor
    cost: Tensor
    pairs: float
    partial: bool
    tables: tuple[object, ...]


Known = tuple[Places | PatternIndex, ...]


@functools.lru_cache(maxsize=256)
@on_cpu
def frame_of(
    known: Known,
    kv_heads: int,
    configs: tuple[Config, Config],
    intervals: bool,
    by_group: bool,
    device: torch.device,
) -> Frame:
    """The frame of an index; the same object for the same arguments.

    Args:
        known: What the host knows of each head, see `ChosenIndex.frame`.
        kv_heads: Number of key heads.
        configs: For small and for large tiles; the one whose tiles are less empty is taken.
        intervals: Whether rows have intervals.
        by_group: As in `tables_of`.
        device: The device of the tables.

    Raises:
        ValueError: If a head has too many tiles to number, or tables are too long for that.
    """
    config = _fullest(known, configs, by_group, device)
    alike: dict[int, list[int]] = {}
    for head, what in enumerate(known):
        if not isinstance(what, PatternIndex):
            alike.setdefault(id(what), []).append(head)
    size, count = 0, 0
    fields, chosen = torch.zeros(2, len(known), HEAD_FIELDS, dtype=torch.int64)
    slots = Slots(len(known) // kv_heads)
    parts: list[Part] = []
    items, costs = [], []
    for heads in alike.values():
        places = known[heads[0]]
        assert not isinstance(places, PatternIndex), "such heads come below"
        grid = grid_of(places, config, by_group, device)
        lists, tiles = len(heads) * grid.lists, len(grid.tile_rows)
        sizes = (
            len(grid.keys) + lists * grid.most_small if grid.most_small else 0,
            len(heads) * tiles * TILE_FIELDS,
            lists * grid.most_steps,
            max(grid.block_n, lists * grid.most_cells),
            lists * grid.most_steps if intervals else 0,
        )  # fmt: skip
        at = []
        for each in sizes:
            at.append(size)
            size += padded(each, ALIGNED)
        if sizes[0] >= 1 << 31 or tiles >= 1 << TILE_BITS:
            raise ValueError(
                f"tables of {sizes[0]} keys and {tiles} tiles are too long; got more tokens"
            )
        keys, of_tiles, steps, cells, lasts = at
        told = lasts if intervals else None
        parts.append(Part(grid, tuple(heads), keys, of_tiles, steps, cells, told, count))
        for i, head in enumerate(heads):
            pooled = slots.of(grid, head, grid.q_tokens, grid.cell_offsets)
            fields[head] = torch.tensor([
                4 * (of_tiles + i * tiles * TILE_FIELDS), grid.q_tokens.data_ptr(),
                4 * keys if grid.most_small else grid.keys.data_ptr(),
                4 * (steps + i * grid.lists * grid.most_steps),
                4 * (cells + i * grid.lists * grid.most_cells),
                grid.cell_steps.data_ptr(), pooled, grid.positions.data_ptr(),
                4 * (lasts + i * grid.lists * grid.most_steps) if intervals else 0,
            ])  # fmt: skip
            chosen[head, [0, 3, 4]] = 1
            chosen[head, 8] = int(intervals)
            chosen[head, 2] = int(grid.most_small > 0)
            items.append((head << TILE_BITS) + torch.arange(tiles))
            costs.append(torch.zeros(tiles, dtype=torch.float64))
        count += len(heads) * tiles
    held: list[object] = []
    pairs = 0.0
    for head, what in enumerate(known):
        if not isinstance(what, PatternIndex):
            continue
        tables = tables_of(_moved(what, device), config.block_m, config.block_n, by_group=by_group)
        pooled = slots.of(tables, head, tables.keys, tables.cell_offsets)
        fields[head] = torch.tensor(addresses_of(tables, pooled))
        items.append((head << TILE_BITS) + torch.arange(len(tables.cost)))
        costs.append(tables.cost)
        pairs += what.density * what.num_queries * what.num_keys
        held.append(tables)
    return Frame(
        config,
        tuple(parts),
        size,
        fields.to(device),
        chosen.to(device),
        slots.table(device),
        slots.cells,
        slots.pooled_rows,
        torch.cat(items).int().to(device),
        torch.cat(costs).to(device),
        pairs,
        any(part.grid.has_partial(intervals) for part in parts),
        tuple(held),
    )


def _fullest(
    known: Sequence[Places | PatternIndex],
    configs: tuple[Config, Config],
    by_group: bool,
    device: torch.device,
) -> Config:
    """The configuration whose tiles have the fewest rows that aren't there."""

    def rows(config: Config) -> int:
        grids = [
            grid_of(what, config, by_group, device)
            for what in known
            if not isinstance(what, PatternIndex)
        ]
        return sum(len(grid.tile_rows) for grid in grids) * config.block_m

    small, large = configs
    return small if rows(small) * SMALL_TILE <= rows(large) else large


@functools.lru_cache(maxsize=256)
def _moved(entry: PatternIndex, device: torch.device) -> PatternIndex:
    """An entry on the device; the same object for the same arguments, so that its tables are made once."""
    return entry.to(device)
