"""What a patched pipeline ran, beside what its plan promised."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .account import Ran
from .plan import Plan

SAME_SIZE = 0.05  # relative difference of lengths at which a forecast holds: text differs by prompt


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
        planned_density: What the plan says; None without one.
        forecast: What the plan expects at the size that it was made at: speed-up, quality.
        sparse_calls, dense_calls: Attention calls in all.
        backends: Names of the backends that ran the sparse calls.
        stages: The same for each component and stage.
        lost: By component, layers whose patched processor the host has replaced: they run stock and
            are not counted.
        made_at: Tokens of the sequences that the plan was made at.
        ran_at: Tokens of those that ran.
        replaced: Components in whose place the pipeline has another transformer than the patched one.
        notes: What could not be done as the plan says, though it ran sparse.
    """

    density: float | None
    planned_density: float | None
    forecast: Mapping[str, Any]
    sparse_calls: int
    dense_calls: int
    backends: tuple[str, ...]
    stages: tuple[StageSummary, ...]
    lost: Mapping[str, tuple[str, ...]]
    made_at: tuple[int, ...] = ()
    ran_at: tuple[int, ...] = ()
    replaced: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the table as `text`."""
        return {**asdict(self), "text": str(self)}

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table("component", "stage", "layers", "sparse calls", "dense calls", "density")
        for row in self.stages:
            dense = [f"{calls} ({reason})" for reason, calls in row.dense_calls.items()]
            cells = (str(row.layers), str(row.sparse_calls), "\n".join(dense) or "0")
            table.add_row(row.component, row.stage, *cells, _share(row.density))
        console = Console(file=io.StringIO(), width=120, color_system=None, highlight=False)
        console.print(table)
        console.print(*self._notes(), sep="\n", markup=False, soft_wrap=True)
        return console.file.getvalue().rstrip()  # pyright: ignore[reportAttributeAccessIssue]

    def _notes(self) -> list[str]:
        ran = f"ran {self.sparse_calls} sparse and {self.dense_calls} dense attention calls"
        planned = self.planned_density
        beside = "" if planned is None else f" (plan: {_share(planned)})"
        notes = [f"{ran}; density {_share(self.density)}{beside}"]
        if self.backends:
            notes.append(f"sparse attention by the backend {' and '.join(self.backends)}")
        notes += self.notes
        notes.extend(self._forecast_notes())
        for component, layers in self.lost.items():
            if layers:
                notes.append(f"{component}: no longer patched, not counted: {', '.join(layers)}")
        for component in self.replaced:
            notes.append(
                f"{component}: the pipeline has another transformer now than the one that was patched, "
                "and what that runs isn't counted; patch the pipeline again"
            )
        return notes

    def _forecast_notes(self) -> list[str]:
        """The forecast with what it is for; the numbers are left out where nothing ran sparse."""
        words = {k: isinstance(v, str) for k, v in self.forecast.items()}
        if self.dense_calls and not self.sparse_calls and not all(words.values()):
            return [
                "no forecast: nothing ran sparse, and it is for a generation that does",
                *(f"{k}: {self.forecast[k]}" for k, word in words.items() if word),
            ]
        if not self.forecast:
            return []
        size = ""
        if self.ran_at and not all(words.values()) and not self._at_its_size():
            size = (
                f" at {_tokens(self.made_at)}, where it was calibrated ({_tokens(self.ran_at)} ran)"
            )
        return [f"forecast{size}: " + ", ".join(f"{k} {v}" for k, v in self.forecast.items())]

    def _at_its_size(self) -> bool:
        """Whether every sequence that ran is about as long as one that the plan was made at."""
        return all(
            any(abs(ran - made) <= SAME_SIZE * made for made in self.made_at) for ran in self.ran_at
        )


def summarise(
    plan: Plan | None,
    ran: Mapping[str, tuple[Ran, ...]],
    lost: Mapping[str, tuple[str, ...]],
    replaced: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
    without_plan: str = "exact",
) -> Summary:
    """The summary of what the runtimes of all transformers counted; `without_plan` names what ran by none."""
    stages = []
    for name, records in ran.items():
        part = plan.components.get(name) if plan else None
        names = [str(stage) for stage in part.stages] if part else []
        for number, text in [*enumerate(names), (None, "outside" if plan else without_plan)]:
            mine = [record for record in records if record.stage == number]
            if mine or number is not None:
                stages.append(_stage(name, text, mine))
    records = [record for part in ran.values() for record in part]
    return Summary(
        density=_density(records),
        planned_density=plan.density if plan else None,
        forecast=dict(plan.forecast) if plan else {},
        sparse_calls=sum(r.calls for r in records if r.dense_because is None),
        dense_calls=sum(r.calls for r in records if r.dense_because is not None),
        backends=tuple(sorted({r.backend for r in records if r.backend is not None})),
        stages=tuple(stages),
        lost=dict(lost),
        made_at=tuple(sorted(_lengths(plan))) if plan else (),
        ran_at=tuple(sorted({record.tokens for record in records})),
        replaced=replaced,
        notes=notes,
    )


def _lengths(plan: Plan) -> set[int]:
    """Tokens that layers saw where the plan was made: all, or the video alone."""
    layouts = [part.layout for part in plan.components.values()]
    return {layout.seq_len for layout in layouts} | {
        layout.num_grid for layout in layouts if layout.num_grid
    }


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


def _tokens(lengths: tuple[int, ...]) -> str:
    """`80 tokens`, or the least and the most of several."""
    least, most = f"{lengths[0]:,}", f"{lengths[-1]:,}"
    return f"{least if least == most else f'{least} to {most}'} tokens"


def _share(density: float | None) -> str:
    return "-" if density is None else f"{density:.1%}"
