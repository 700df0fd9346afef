"""What one launch does: the order of its tiles, and where each head's tables lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...index import SparseIndex
from ...on_cpu import on_cpu
from .config import Config
from .slots import Slots
from .tables import HEAD_FIELDS, TILE_BITS, Tables, tables_of

SMALL_TILE = 1.05  # cost of two tiles of 64 rows over one of 128, measured on an H200


@dataclass(frozen=True, eq=False)
class Work:
    """An index, a number of key heads and a configuration, ready to launch.

    Args:
        config: Block sizes, warps and stages.
        order: int32 `[items]`: `head << TILE_BITS | tile`, in the order of launching.
        heads: int64 `[H, HEAD_FIELDS]`, addresses of tables.
        slots: int64 `[S, SLOT_FIELDS]`: pairs of a pattern with a far field and a key head.
        cells: Most cells of a pattern.
        pooled_rows: Pooled keys of all slots, with one of no tokens before each slot's.
        tables: Keeps what is pointed to.
        partial: Whether many steps may be of fewer keys than others.
        num_bytes: Memory of what no other index shares.
    """

    config: Config
    order: Tensor
    heads: Tensor
    slots: Tensor
    cells: int
    pooled_rows: int
    tables: tuple[object, ...]
    partial: bool = False
    num_bytes: int = 0

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Copies and pickles hold None: what is pointed to isn't theirs."""
        return type(None), ()


def work_of(
    index: SparseIndex,
    kv_heads: int,
    small: Config,
    large: Config,
    *,
    by_group: bool = False,
    heads: tuple[int, ...] | None = None,
) -> Work:
    """The work of an index, made once.

    Args:
        index: The index, on the device of the launch.
        kv_heads: Number of key heads.
        small, large: Configurations for tiles of fewer and of more rows; what costs less is taken.
        by_group: As in `tables_of`.
        heads: Those that are computed; None for all.
    """
    name = ("triton", kv_heads, small, large, by_group, heads)
    work = index.cache.get(name)
    if not isinstance(work, Work):
        work = _work(index, kv_heads, (small, large), by_group, heads)
        index.cache[name] = work
    return work


def launch_order(costs: list[Tensor]) -> Tensor:
    """Items `head << TILE_BITS | tile` in the order of launching, int64.

    Heads with most work come first, whole, so that one head's keys stay in the cache; in a head, tiles
    come by half octaves of cost, and neighbours stay together.

    Args:
        costs: For each head the cost of its tiles.

    Raises:
        ValueError: If a head has too many tiles to number.
    """
    if max(len(cost) for cost in costs) >= 1 << TILE_BITS:
        raise ValueError(f"a head must have fewer than {1 << TILE_BITS} tiles; got more tokens")
    items = [(h << TILE_BITS) + torch.arange(len(cost)) for h, cost in enumerate(costs)]
    return in_order(torch.cat(items), torch.cat(costs), len(costs))


def in_order(items: Tensor, cost: Tensor, num_heads: int) -> Tensor:
    """As `launch_order`, of items on any device, `[items]`, tiles in order, and their costs; no wait."""
    head, cost = items >> TILE_BITS, cost.double()
    total = cost.new_zeros(num_heads).index_add_(0, head, cost)
    rank = total.argsort(descending=True, stable=True).argsort()
    octaves = (cost.log2() * 2).floor().long()
    return items[(rank[head] * 128 - octaves).argsort(stable=True)]


@on_cpu
def _work(
    index: SparseIndex,
    kv_heads: int,
    configs: tuple[Config, Config],
    by_group: bool,
    heads: tuple[int, ...] | None,
) -> Work:
    device = index.entries[0].q_offsets.device
    config, tables = _cheapest(index, configs, by_group)
    mine = range(index.num_heads) if heads is None else heads
    every = [tables[p].cost for p in index.head_to_pattern]
    costs = [cost if head in mine else cost[:0] for head, cost in enumerate(every)]
    slots = Slots(index.num_heads // kv_heads)
    fields = [[0] * HEAD_FIELDS for _ in costs]
    for head in mine:
        t = tables[index.head_to_pattern[head]]
        fields[head] = addresses_of(t, slots.of(t, head, t.keys, t.cell_offsets))
    return Work(
        config,
        launch_order(costs).int().to(device),
        torch.tensor(fields).view(-1, HEAD_FIELDS).to(device),
        slots.table(device),
        slots.cells,
        slots.pooled_rows,
        tables,
    )


def _cheapest(
    index: SparseIndex, configs: tuple[Config, Config], by_group: bool
) -> tuple[Config, tuple[Tables, ...]]:
    """The configuration with the least work, and tables for it."""
    best = None
    for config, factor in zip(configs, (SMALL_TILE, 1.0), strict=True):
        tables = tuple(
            tables_of(e, config.block_m, config.block_n, rows=index.rows, by_group=by_group)
            for e in index.entries
        )
        steps = sum(float(tables[p].cost.sum()) for p in index.head_to_pattern)
        cost = steps * config.block_m * config.block_n * factor
        if best is None or cost < best[0]:
            best = (cost, config, tables)
    assert best is not None, "there are configurations to choose from"
    return best[1], best[2]


def addresses_of(t: Tables, pooled: int) -> list[int]:
    """The fields of a head whose pooled keys begin at row `pooled`."""
    arrays = (t.tiles, t.q_tokens, t.keys, t.steps, t.cells, t.cell_steps)
    return [*(x.data_ptr() for x in arrays), pooled, t.positions.data_ptr(), t.lasts.data_ptr()]
