"""Whether a repeated search would choose the same: its choice, with costs as far off as timings are.

A profile and a sensitivity come out the same when they are measured again on one machine; times don't. So the
costs are drawn anew around what was timed, smoothed as measured ones are, and solved with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from .cost import Costs, CostTable, smoothed
from .local import improve
from .profile import ComponentProfile
from .solve import Choice, Problem, cheapest

DRAWS = 3


def repeated(
    parts: Mapping[str, ComponentProfile],
    tables: Mapping[str, Costs],
    calls: Mapping[str, Sequence[int]],
    problem: Problem,
    loss: float,
) -> dict[str, Any] | None:
    """How alike the choices of repeated searches would be; JSON-ready, None if that isn't known.

    `spread` is what single timings are off by, relative. `same` is the least share of heads, over noise
    levels, whose pattern a repeated search would choose again. `density` is the most that its density would
    differ by.

    Args:
        parts: The transformers' profiles, by component name.
        tables: What attention costs in each transformer, by component name.
        calls: The forwards of a generation at each stage, by component name.
        problem: The problem that was solved.
        loss: The largest loss of the choices that are compared: that of the search's own.
    """
    known = [table for costs in tables.values() for table in costs.values()]
    if all(table.source is not None for table in known):  # read from a file, so always the same
        return {"spread": 0.0, "same": 1.0, "density": 0.0}
    spreads = [table.spread for table in known if table.source is None]
    if any(spread is None for spread in spreads):
        return None
    own = _fastest(problem, loss)
    generator = torch.Generator().manual_seed(0)
    others = []
    for _ in range(DRAWS):
        drawn = {
            name: {size: _timed_again(table, generator) for size, table in costs.items()}
            for name, costs in tables.items()
        }
        others.append(_fastest(_priced(problem, parts, drawn, calls), loss))
    return {
        "spread": round(max(spread for spread in spreads if spread is not None), 4),
        "same": round(min((c.pick == own.pick).double().mean().item() for c in others), 4),
        "density": round(max(abs(c.density - own.density) for c in others), 5),
    }


def _fastest(problem: Problem, loss: float) -> Choice:
    """The fastest choice of at most so much loss."""
    return improve(problem, cheapest(problem, lambda choice: choice.loss <= loss), loss=loss)


def _timed_again(table: CostTable, generator: torch.Generator) -> CostTable:
    """The table as another timing of the same device could give it."""
    if table.source is not None:
        return table

    def off(seconds: float) -> float:
        drawn = torch.randn(1, generator=generator, dtype=torch.float64).item()
        return max(seconds * (1 + (table.spread or 0.0) * drawn), 1e-12)

    head = table.dense if table.dense_head is None else table.dense_head
    timed = {
        far: tuple((d, off(s)) for d, s in points if 0 < d < 1)
        for far, points in table.sparse.items()
    }
    return smoothed(replace(table, sparse=timed, dense_head=off(head), spread=None))


def _priced(
    problem: Problem,
    parts: Mapping[str, ComponentProfile],
    tables: Mapping[str, Costs],
    calls: Mapping[str, Sequence[int]],
) -> Problem:
    """The problem with the seconds of other costs."""
    rows = []
    for (stage, layer, head), densities in zip(
        problem.units, problem.density.tolist(), strict=True
    ):
        name, level = problem.components[stage], problem.level_of[stage]
        part = parts[name]
        table, kinds = tables[name][part.heads[layer]], part.candidates(level, layer)[head].kinds
        rows.append(table.prices(kinds, densities, calls[name][level]))
    seconds = torch.tensor(rows, dtype=torch.float64)
    if problem.ran is not None:
        seconds *= problem.ran[:, None]
    return replace(problem, seconds=seconds)
