"""What attention costs in the searched generation: measured or by a table, at the speed it has in there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .candidates import tilings
from .cost import Costs, CostTable, measure_cost
from .profile import ComponentProfile
from .target_device import TargetDevice
from .verify import Reference

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
                known[key] = measure_cost(
                    layout,
                    num_heads,
                    head_dim,
                    device=module.device,
                    dtype=module.dtype,
                    backend=backend,
                    orders=orders,
                )
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
