"""What a call of the Gluon backend launches: which heads its kernel takes, and the tables of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...index import SparseIndex
from ...on_cpu import on_cpu
from ..triton.config import configs_for as gathering_configs_for
from ..triton.slots import Slots
from ..triton.tables import TILE_BITS
from ..triton.tables import Tables as Gathering
from ..triton.tables import tables_of as gathering_tables_of
from ..triton.work import Work as GatheringWork
from ..triton.work import launch_order
from ..triton.work import work_of as gathering_work_of
from .config import Config, configs_for
from .tables import LIST_FIELDS, TILE_FIELDS, Tables, tables_of

# how much work a head may take more than where keys are gathered, and be taken: a guess, until both are timed
MORE_WORK = 1.25


class Choice(NamedTuple):
    """Which patterns' keys are loaded whole, and how.

    Args:
        config: How the kernel is launched.
        tables: For each entry its tables, or None: keys of its heads are gathered.
        gathering: For each entry the tables by which they are.
    """

    config: Config
    tables: tuple[Tables | None, ...]
    gathering: tuple[Gathering, ...]


@dataclass(frozen=True, eq=False)
class Work:
    """An index and a number of key heads, ready to launch.

    Args:
        config: How the kernel is launched.
        tiles: int32 `[items, TILE_FIELDS]`, in the order of launching.
        steps, masks: Those of all entries, see `Tables`.
        slots, cells, pooled_rows: Where pooled keys lie, see `Slots`.
        held: Keeps what slots point to.
        others: What the gathering kernel does: the other heads; None if there are none.
    """

    config: Config
    tiles: Tensor
    steps: Tensor
    masks: Tensor
    slots: Tensor
    cells: int
    pooled_rows: int
    held: tuple[Gathering, ...]
    others: GatheringWork | None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Copies and pickles hold None: what is pointed to isn't theirs."""
        return type(None), ()


def choice_of(index: SparseIndex, head_dim: int, *, masked: bool) -> Choice:
    """Which heads of an index the kernel takes, found once.

    Args:
        index: The index, on any device.
        head_dim: The channels of a key; both kernels' configurations follow from it.
        masked: Whether calls have row intervals.
    """
    name = ("gluon", head_dim, masked)
    found = index.cache.get(name)
    if not isinstance(found, Choice):
        found = index.cache[name] = _choice(index, head_dim, masked)
    return found


def work_of(index: SparseIndex, kv_heads: int, head_dim: int, *, masked: bool) -> Work:
    """The work of an index, made once; arguments as of `choice_of`, and the number of key heads."""
    name = ("gluon", kv_heads, head_dim, masked)
    work = index.cache.get(name)
    if not isinstance(work, Work):
        choice = choice_of(index, head_dim, masked=masked)
        work = index.cache[name] = _work(index, kv_heads, head_dim, choice)
    return work


@on_cpu
def _choice(index: SparseIndex, head_dim: int, masked: bool) -> Choice:
    gathering, bars = [], []
    for entry in index.entries:
        found = [
            (gathering_tables_of(entry, c.block_m, c.block_n, rows=index.rows), c)
            for c in gathering_configs_for("sm90", head_dim)
        ]
        bar, tables = min(
            ((_cost(t, c.block_m, c.block_n), t) for t, c in found), key=lambda pair: pair[0]
        )
        gathering.append(tables)
        bars.append(bar)
    best = None
    far = any(entry.far is not None for entry in index.entries)
    for config in configs_for(head_dim, far=far, masked=masked):
        ours, total = [], 0.0
        for p, entry in enumerate(index.entries):
            tables = tables_of(entry, config.block_m, config.block_n, index.rows)
            cost = most = MORE_WORK * bars[p]
            if tables is not None:
                cost = _cost(tables, config.block_m, config.block_n)
            ours.append(tables if cost <= most else None)
            total += min(cost, most) * len(index.heads_of[p])
        if best is None or total < best[0]:
            best = (total, Choice(config, tuple(ours), tuple(gathering)))
    assert best is not None, "there are configurations to choose from"
    return best[1]


def _cost(tables: Tables | Gathering, block_m: int, block_n: int) -> float:
    return float(tables.cost.sum()) * block_m * block_n


@on_cpu
def _work(index: SparseIndex, kv_heads: int, head_dim: int, choice: Choice) -> Work:
    device = index.entries[0].q_offsets.device
    steps, masks, first_step, first_mask = [], [], [], []
    for tables in choice.tables:
        first_step.append(sum(map(len, steps)))
        first_mask.append(sum(map(len, masks)))
        if tables is not None:
            steps.append(tables.steps + torch.tensor([0, 2 * first_mask[-1]], dtype=torch.int32))
            masks.append(tables.masks)
    slots = Slots(index.num_heads // kv_heads)
    tiles, costs, rest = [], [], []
    for head, p in enumerate(index.head_to_pattern):
        tables, there = choice.tables[p], choice.gathering[p]
        if tables is None:
            rest.append(head)
            costs.append(torch.zeros(0, dtype=torch.float64))
            continue
        mine = torch.empty(len(tables.tiles), TILE_FIELDS, dtype=torch.int64)
        mine[:, 0] = head
        mine[:, LIST_FIELDS] = tables.tiles
        mine[:, 3:7] += first_step[p]
        mine[:, 7] = slots.of(there, head, there.keys, there.cell_offsets)
        tiles.append(mine)
        costs.append(tables.cost)
    order = launch_order(costs)
    before = torch.tensor([0, *map(len, costs)]).cumsum(0)
    place = before[order >> TILE_BITS] + (order & ((1 << TILE_BITS) - 1))
    none = torch.zeros(0, TILE_FIELDS, dtype=torch.int64)
    configs, others = gathering_configs_for("sm90", head_dim), None
    if rest:
        others = gathering_work_of(index, kv_heads, *configs, heads=tuple(rest))
    return Work(
        choice.config,
        torch.cat([none, *tiles])[place].int().to(device),
        torch.cat([none[:, :2].int(), *steps]).to(device),
        torch.cat(masks or [none[:, :1].int()]).to(device),
        slots.table(device),
        slots.cells,
        slots.pooled_rows,
        choice.gathering,
        others,
    )
