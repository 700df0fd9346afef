"""Measuring a device table: what a head costs over density, tokens, head_dim and dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from rich.table import Table

from ..environment import environment
from ..layout import TokenLayout, tile_order
from ..search.cost import BUDGETS, CostTable, measure_cost, timed
from ..search.device_table import DeviceTable, Dtype, Entry, processor, slug
from .lists import layout_of
from .measure import num_threads, watched

DTYPES = {
    name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")
}  # that a table may hold
TILE = (4, 4, 4)
REPEATS = 4


@dataclass(frozen=True)
class CostSweep:
    """What is measured.

    Args:
        grids: The frames, rows and columns of tokens of each size.
        head_dims, dtypes: Every combination of them is measured at every size.
        densities: The densities that patterns are made for, each in (0, 1); the far field comes on top.
        heads: The number of heads of the attention calls.
        device, backend: As `sparse_attention` takes them.
        threads: The number of CPU threads.

    Raises:
        ValueError: If a number is out of range, or a dtype or a device isn't known here.
    """

    grids: tuple[tuple[int, int, int], ...]
    head_dims: tuple[int, ...]
    dtypes: tuple[str, ...] = ("float32",)
    densities: tuple[float, ...] = BUDGETS
    heads: int = 2
    device: str = "cpu"
    backend: str = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        for density in self.densities:
            if not 0 < density < 1:
                raise ValueError(f"a density must lie between 0 and 1, got {density!r}")
        for head_dim in self.head_dims:
            if not 1 <= head_dim <= 1024:
                raise ValueError(f"head_dim must be 1 to 1024, got {head_dim}")
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")

    @staticmethod
    def sizes(tokens: Sequence[str]) -> tuple[tuple[int, int, int], ...]:
        """Grids of `"4608"` or `"8x24x24"`, several of them separated by commas."""
        words = [word.strip() for text in tokens for word in text.split(",")]
        return tuple(dict.fromkeys(layout_of(word).grid for word in words))


def measure_device(sweep: CostSweep, report: Callable[[str], None]) -> DeviceTable:
    """Time everything in the sweep on this machine.

    Args:
        sweep: The sizes, dtypes and densities that are timed.
        report: Called with a line of text for each size.

    Raises:
        ValueError, NotImplementedError: If the backend is unknown or can't run this.
    """
    tables: list[CostTable] = []
    entries: list[Entry] = []
    with num_threads(sweep.threads), torch.inference_mode(), watched() as load:
        for grid, head_dim, dtype in itertools.product(sweep.grids, sweep.head_dims, sweep.dtypes):
            layout = TokenLayout.video(*grid)
            report(f"{layout.seq_len} tokens, head_dim {head_dim}, {dtype}")
            table = measure_cost(
                layout,
                sweep.heads,
                head_dim,
                device=sweep.device,
                dtype=DTYPES[dtype],
                backend=sweep.backend,
                budgets=sweep.densities,
            )
            tables.append(table)
            entries.append(
                _entry(table, head_dim, _permute_seconds(sweep, layout, head_dim, dtype))
            )
        kind = sweep.device.split(":")[0]
        name, found = slug(kind), environment(sweep.device)
    backends = sorted({table.backend for table in tables})
    if len(backends) > 1:
        raise ValueError(
            f"one backend must run all dtypes of a table, here it takes {', '.join(backends)}; "
            "measure one --dtype after the other"
        )
    return DeviceTable(
        name=name,
        device=kind,
        processor=processor(kind),
        threads=sweep.threads,
        backend=backends[0],
        heads=sweep.heads,
        environment=found,
        foreign_cores=load.foreign_cores,
        entries=tuple(entries),
    )


def _entry(table: CostTable, head_dim: int, permute: float) -> Entry:
    return Entry(
        grid=table.layout.grid,
        head_dim=head_dim,
        dtype=cast(Dtype, table.dtype),
        dense=table.dense,
        dense_head=table.dense if table.dense_head is None else table.dense_head,
        masked=table.sparse[False],
        far_field=table.sparse[True],
        index=table.index_seconds,
        permute=permute,
    )


def _permute_seconds(sweep: CostSweep, layout: TokenLayout, head_dim: int, dtype: str) -> float:
    """Seconds a head of taking three tensors into tile order and one back; the fastest of a few."""
    order = tile_order(layout, TILE).order.to(sweep.device)
    shape = (1, sweep.heads, layout.seq_len, head_dim)
    x = torch.randn(shape, device=sweep.device).to(DTYPES[dtype])
    back = torch.empty_like(x)

    def there_and_back() -> None:
        for _ in range(3):
            x.index_select(2, order)
        back.index_copy_(2, order, x)

    return min(timed(there_and_back, x.device) for _ in range(REPEATS)) / sweep.heads


def cost_table(table: DeviceTable) -> Table:
    """Every size of a device table, in milliseconds a head."""
    densities = [d for d, _ in table.entries[0].masked]
    columns = [f"{density:.0%}" for density in densities]
    shown = Table(
        "tokens", "dim", "dtype", "SDPA", "dense", *columns, "+ far", "index", "order",
        title=f"{table.name}, backend {table.backend}: milliseconds of one head",
    )  # fmt: skip
    for entry in table.entries:
        masked = [entry.seconds(False, density) for density in densities]
        middle = densities[len(densities) // 2]
        far = entry.seconds(True, middle) / entry.seconds(False, middle) - 1
        times = [entry.dense, entry.dense_head, *masked]
        shown.add_row(
            f"{entry.tokens:,}", str(entry.head_dim), entry.dtype,
            *(f"{1e3 * s:.2f}" for s in times), f"{far:+.0%}",
            *("-" if s is None else f"{1e3 * s:.2f}" for s in (entry.index, entry.permute)),
        )  # fmt: skip
    return shown
