"""What attention costs in the searched generation: measured here, or by the table of a target device.

Times that are measured are smoothed (see `cost.smoothed`) and corrected to the speed that attention has
inside a generation. Of a target device the user says how long a dense generation takes there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..integrations import heads_of
from ..layout import TokenLayout
from ..words import option
from .candidates import tilings
from .cost import Costs, CostTable, measure_cost, smoothed
from .device_table import DeviceTable, slug
from .profile import ComponentProfile
from .verify import Reference


@dataclass(frozen=True)
class TargetDevice:
    """A device that a plan is searched for, which may be another than the one that searches.

    Args:
        table: What attention costs on the target device.
        dense_seconds: The seconds that one dense generation takes on the target device. None if the table is
            of this machine, where they are measured.

    Raises:
        ValueError: If `dense_seconds` is None for another machine's table, or no finite number above 0.
    """

    table: DeviceTable
    dense_seconds: float | None

    def __post_init__(self) -> None:
        seconds = self.dense_seconds
        if seconds is None and not self.table.here:
            raise ValueError(
                f"the device table {self.table.name} is of another machine ({slug(self.table.device)} "
                f"is this one): give {option('dense_seconds')}, what one dense generation at these "
                "settings takes there; attention is only a part of it"
            )
        if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
            name = option("dense_seconds")
            raise ValueError(f"{name} must be a finite number above 0, got {seconds!r}")

    @staticmethod
    def of(
        table: str | os.PathLike[str] | DeviceTable | None, dense_seconds: float | None
    ) -> TargetDevice | None:
        """The target device that a user names; None without a table, as everything is then measured here.

        Raises:
            ValueError: If `dense_seconds` is given without a table, or is missing or out of range.
        """
        if table is None:
            if dense_seconds is not None:
                raise ValueError(
                    f"{option('dense_seconds')} is for a device table: give {option('device_table')} too, "
                    "or leave it out"
                )
            return None
        return TargetDevice(
            table if isinstance(table, DeviceTable) else DeviceTable.load(table), dense_seconds
        )

    def check(self, transformer: Any) -> None:
        """Raise ValueError unless the table has every head_dim of a transformer, at its dtype."""
        dtype = str(transformer.dtype).removeprefix("torch.")
        for head_dim in {head_dim for _, head_dim in heads_of(transformer).values()}:
            self.table.check(head_dim, dtype)

    def cost(self, layout: TokenLayout, head_dim: int, dtype: torch.dtype) -> CostTable:
        """The costs of heads on the target device, at one token layout, head_dim and dtype."""
        return self.table.at(layout, head_dim, str(dtype).removeprefix("torch."))

    def smaller(self, head_dim: int, dtype: str) -> Callable[[TokenLayout], CostTable | None]:
        """A function that gives the costs at another token layout, or None if the table doesn't cover it."""

        def at(layout: TokenLayout) -> CostTable | None:
            covered = self.table.covers(layout.seq_len, head_dim, dtype)
            return self.table.at(layout, head_dim, dtype) if covered else None

        return at

    def generation(self, measured: float, stock: float) -> float:
        """The seconds that a dense generation takes on the target device.

        Args:
            measured: The seconds that it takes on this machine.
            stock: The seconds that its dense attention takes by the table.

        Raises:
            ValueError: If the whole is less than its attention.
        """
        if self.dense_seconds is None:
            return measured
        if self.dense_seconds < stock:
            raise ValueError(
                f"{option('dense_seconds')} must be at least the {stock:.4g} s that dense attention alone "
                f"takes by the device table {self.table.name}, got {self.dense_seconds:g}; is it the time of "
                "a generation with these settings on that device?"
            )
        return self.dense_seconds


Parts = Mapping[str, ComponentProfile]  # by component name, as all mappings here
Calls = Mapping[str, Sequence[int]]  # for each stage the forwards of a generation, times the batch


def cost_tables(
    modules: Mapping[str, nn.Module], parts: Parts, backend: str, target_device: TargetDevice | None
) -> dict[str, Costs]:
    """What attention costs in each transformer, by component name; layers that are alike share a table.

    Args:
        modules: The transformers, by component name.
        parts: Their profiles, by component name.
        backend: The sparse backend that is timed.
        target_device: The device whose table is used; None to measure on this one.
    """
    known: dict[tuple[Any, ...], CostTable] = {}
    tables: dict[str, dict[tuple[int, int], CostTable]] = {name: {} for name in parts}
    for name, part in parts.items():
        module: Any = modules[name]
        layout = part.known_layout
        orders = tilings(layout)[1:]
        for num_heads, head_dim in part.head_sizes:
            key = layout, num_heads, head_dim, module.device, module.dtype, orders
            if key not in known and target_device is not None:
                known[key] = target_device.cost(layout, head_dim, module.dtype)
            elif key not in known:
                timed = measure_cost(
                    layout,
                    num_heads,
                    head_dim,
                    device=module.device,
                    dtype=module.dtype,
                    backend=backend,
                    orders=orders,
                )
                known[key] = smoothed(timed)
            tables[name][num_heads, head_dim] = known[key]
    return dict(tables)


def inside(
    tables: Mapping[str, Costs], parts: Parts, calls: Calls, references: Sequence[Reference]
) -> dict[str, Costs]:
    """The tables corrected to the speed that attention had inside the dense generations.

    The factor is the same for all transformers. Whatever slows attention down there (other programs, heat)
    slows down sparse attention too. By the tables alone that time would count as time outside of attention,
    which stays when attention is sparse.

    Args:
        tables: What attention costs in each transformer, by component name.
        parts: Their profiles, by component name.
        calls: The forwards of a generation at each stage, by component name.
        references: The dense generations, with the seconds of their attention.
    """
    taken = sum(sum(r.attention.values()) for r in references) / len(references)
    times = taken / _stock(tables, parts, calls)
    return {
        name: {size: replace(table, in_generation=times) for size, table in costs.items()}
        for name, costs in tables.items()
    }


def dense_generation(
    tables: Mapping[str, Costs],
    parts: Parts,
    calls: Calls,
    measured: float,
    target_device: TargetDevice | None,
) -> float:
    """Seconds of a dense generation on the device that is solved for; `measured` is that of this one."""
    if target_device is None:
        return measured
    return target_device.generation(measured, _stock(tables, parts, calls))


def _stock(tables: Mapping[str, Costs], parts: Parts, calls: Calls) -> float:
    """Seconds of a generation's dense attention by the tables."""
    return sum(
        tables[name][part.heads[layer]].dense * sum(calls[name]) * part.heads[layer][0]
        for name, part in parts.items()
        for layer in part.layers
    )
