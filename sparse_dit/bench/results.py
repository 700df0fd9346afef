"""What a benchmark gives: rows and where they were measured; as JSON and as tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ..whole_file import write_text
from .quick import Value
from .rows import Row, Skipped

QUIET_CORES = 0.1  # other programs may use this much before a wall clock is worth little


@dataclass(frozen=True)
class Results:
    """Everything that a run of the kernel benchmark measured.

    Args:
        command: The command line.
        environment: Versions and machine, readable text by name.
        variant: Which build of the native kernel ran; None if it didn't.
        clock, threads: The clock (`"wall"` or `"cpu"`) and the number of CPU threads that it was timed with.
        foreign_cores: Mean number of cores that others used meanwhile; None if that isn't known.
        load_averages: The system's load averages around each set of timings.
        rows, skipped: What was measured and what could not be.
        quick: The table of `--quick`, or empty.
    """

    command: str
    environment: dict[str, str]
    variant: str | None
    clock: str
    threads: int
    foreign_cores: float | None
    load_averages: list[tuple[float, float, float]]
    rows: list[Row]
    skipped: list[Skipped]
    quick: list[Value]

    def save(self, path: Path) -> None:
        """Write JSON; the file appears whole or not at all."""
        text = json.dumps({"version": 1, **dataclasses.asdict(self)}, indent=1) + "\n"
        write_text(path, text)

    def notes(self) -> list[str]:
        """Sentences under the tables: peak, disturbance, what was left out."""
        lines = [
            f"{row.backend}, {row.tokens} tokens, head_dim {row.head_dim}: dense mode "
            f"{row.gflops:.0f} GFLOPS, {row.gflops / row.sgemm_gflops:.0%} of torch's sgemm here "
            f"({row.sgemm_gflops:.0f})"
            for row in self.rows
            if row.pattern == "dense" and row.sgemm_gflops
        ]
        if self.variant:
            lines.append(f"native kernel: {self.variant}")
        lines += load_notes(self.foreign_cores, "use --clock cpu" if self.clock != "cpu" else None)
        for backend, reason in dict.fromkeys((s.backend, s.reason) for s in self.skipped):
            what = dict.fromkeys(
                f"{s.pattern} {s.dtype}"
                for s in self.skipped
                if (s.backend, s.reason) == (backend, reason)
            )
            lines.append(f"skipped {backend} ({', '.join(what)}): {reason}")
        return lines


def load_notes(foreign_cores: float | None, remedy: str | None) -> list[str]:
    """A sentence if other programs disturbed the clock; a remedy of None: this clock doesn't mind."""
    if foreign_cores is None or foreign_cores <= QUIET_CORES:
        return []
    advice = f"; {remedy}, or repeat it when it is quiet" if remedy else ""
    return [f"others used {foreign_cores:.2f} cores of this machine meanwhile{advice}"]


def rows_table(rows: Sequence[Row]) -> Table:
    """Every row."""
    table = Table(
        "backend", "pattern", "tokens", "dim", "dtype", "density", "ms", "±", "SDPA", "Flex",
        "speed-up", "efficiency", "to own dense",
    )  # fmt: skip
    for row in rows:
        flex = "-" if row.flex_seconds is None else f"{1e3 * row.flex_seconds:.1f}"
        table.add_row(
            row.backend, row.pattern, str(row.tokens), str(row.head_dim), row.dtype,
            f"{row.density:.2%}", f"{1e3 * row.seconds:.2f}", f"{row.spread:.0%}",
            f"{1e3 * row.sdpa_seconds:.1f}", flex, f"{row.speedup:.2f}",
            f"{row.efficiency:.2f}", f"{row.dense_efficiency:.2f}",
        )  # fmt: skip
    return table


def quick_tables(values: Sequence[Value]) -> list[Table]:
    """The table of `--quick` for each backend, with what the kernel should reach in brackets."""
    tables = []
    for backend in dict.fromkeys(value.backend for value in values):
        mine = [value for value in values if value.backend == backend]
        dims = list(dict.fromkeys(value.head_dim for value in mine))
        columns = [f"head_dim {dim} (goal)" for dim in dims]
        table = Table("8,192 tokens", *columns, title=f"backend {backend}")
        for name in dict.fromkeys(value.measure for value in mine):
            fields = [value for value in mine if value.measure == name]
            table.add_row(name, *(_field(value) for value in fields))
        tables.append(table)
    return tables


def _field(value: Value) -> str:
    sign = "<" if value.unit == "%" else ""
    goal = f"({sign}{value.goal:g}{value.unit})"
    if value.value is None:
        return f"- {goal}"
    digits = 1 if value.unit == "%" or value.value >= 10 else 2
    if not value.reached and round(value.value, digits) == value.goal:
        digits += 1  # or it would read "1.28 (1.28) below"
    mark = "" if value.reached else " below" if value.unit != "%" else " above"
    return f"{value.value:.{digits}f}{value.unit} {goal}{mark}"
