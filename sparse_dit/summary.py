"""What a patched pipeline ran, beside what its plan promised."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .plan import Plan
from .runtime import Ran


@dataclass(frozen=True)
class StageSummary:
    """One stage of one component.

    Args:
        component: `"transformer"` or `"transformer_2"`.
        stage: Noise levels and branch as text; "outside" for calls that no stage covers.
        layers: Number of layers that ran in it.
        sparse_calls: Attention calls that ran sparse.
        dense_calls: Attention calls that ran stock, by reason.
        density: Computed pairs / all pairs over these calls; None if there was none.
    """

    component: str
    stage: str
    layers: int
    sparse_calls: int
    dense_calls: Mapping[str, int]
    density: float | None


@dataclass(frozen=True)
class Summary:
    """What ran so far. `str()` is a table.

    Args:
        density: Computed pairs / all pairs over every self-attention call of the patched
            transformers, the dense ones included; None if nothing ran.
        planned_density: What the plan says.
        forecast: What the plan expects: speed-up, quality.
        sparse_calls, dense_calls: Attention calls in all.
        backends: Names of the backends that ran the sparse calls.
        stages: The same for each component and stage.
        lost: By component, layers whose patched processor the host has replaced: they run stock and
            are not counted.
        replaced: Components in whose place the pipeline has another transformer than the patched one.
    """

    density: float | None
    planned_density: float | None
    forecast: Mapping[str, Any]
    sparse_calls: int
    dense_calls: int
    backends: tuple[str, ...]
    stages: tuple[StageSummary, ...]
    lost: Mapping[str, tuple[str, ...]]
    replaced: tuple[str, ...] = ()

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table("component", "stage", "layers", "sparse calls", "dense calls", "density")
        for row in self.stages:
            dense = [f"{calls} ({reason})" for reason, calls in row.dense_calls.items()]
            cells = (str(row.layers), str(row.sparse_calls), "\n".join(dense) or "0")
            table.add_row(row.component, row.stage, *cells, _share(row.density))
        console = Console(file=io.StringIO(), width=110, color_system=None, highlight=False)
        console.print(table)
        console.print(*self._notes(), sep="\n", markup=False, soft_wrap=True)
        return console.file.getvalue().rstrip()  # pyright: ignore[reportAttributeAccessIssue]

    def _notes(self) -> list[str]:
        ran = f"ran {self.sparse_calls} sparse and {self.dense_calls} dense attention calls"
        notes = [f"{ran}; density {_share(self.density)} (plan: {_share(self.planned_density)})"]
        if self.backends:
            notes.append(f"sparse attention by the backend {' and '.join(self.backends)}")
        if self.forecast:
            notes.append("forecast: " + ", ".join(f"{k} {v}" for k, v in self.forecast.items()))
        for component, layers in self.lost.items():
            if layers:
                notes.append(f"{component}: no longer patched, not counted: {', '.join(layers)}")
        for component in self.replaced:
            notes.append(
                f"{component}: the pipeline has another transformer now than the one that was patched, "
                "and what that runs isn't counted; patch the pipeline again"
            )
        return notes


def summarise(
    plan: Plan,
    ran: Mapping[str, tuple[Ran, ...]],
    lost: Mapping[str, tuple[str, ...]],
    replaced: tuple[str, ...] = (),
) -> Summary:
    """Put the runtimes' accounts together."""
    stages = []
    for name, records in ran.items():
        names = [str(stage) for stage in plan.components[name].stages]
        for number, text in [*enumerate(names), (None, "outside")]:
            part = [record for record in records if record.stage == number]
            if part or number is not None:
                stages.append(_stage(name, text, part))
    records = [record for part in ran.values() for record in part]
    return Summary(
        density=_density(records),
        planned_density=plan.density,
        forecast=dict(plan.forecast or {}),
        sparse_calls=sum(r.calls for r in records if r.dense_because is None),
        dense_calls=sum(r.calls for r in records if r.dense_because is not None),
        backends=tuple(sorted({r.backend for r in records if r.backend is not None})),
        stages=tuple(stages),
        lost=dict(lost),
        replaced=replaced,
    )


def _stage(component: str, text: str, records: list[Ran]) -> StageSummary:
    dense: Counter[str] = Counter()
    for record in records:
        if record.dense_because is not None:
            dense[record.dense_because] += record.calls
    sparse = sum(r.calls for r in records if r.dense_because is None)
    layers = len({record.layer for record in records})
    return StageSummary(component, text, layers, sparse, dict(dense), _density(records))


def _density(records: list[Ran]) -> float | None:
    pairs = sum(record.pairs for record in records)
    return sum(record.computed for record in records) / pairs if pairs else None


def _share(density: float | None) -> str:
    return "-" if density is None else f"{density:.1%}"
