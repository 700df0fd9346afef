"""The short benchmark: the figures that the CPU kernel is judged by, in under a minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..layout import TokenLayout
from .kernel import Case, Conditions, Size, measure
from .lists import columns, dense_blocks, multi_diagonal, random_blocks
from .rows import Row, Skipped

HEAD_DIMS = (64, 128)
TOKENS = TokenLayout.video(8, 32, 32)  # 8,192
DIAGONAL_TOKENS = TokenLayout.video(8, 30, 52)  # 12,480
SECONDS = 25.0  # for timing; with checks, and FlexAttention to compile, the whole stays under 60
HEADS = 1


@dataclass(frozen=True)
class Measure:
    """A line of the table.

    Args:
        name: What is written before the values.
        value: Computes the value from the rows of one backend and head_dim. It gives None or raises
            LookupError if a row that it needs wasn't measured.
        goals: What the kernel should reach on two cores with AVX2, at each of the two head_dims.
        unit: `"x"`, `""` or `"%"`.
        at_most: Whether less is better.
    """

    name: str
    value: Callable[[Sequence[Row]], float | None]
    goals: tuple[float, float]
    unit: str = ""
    at_most: bool = False


@dataclass(frozen=True)
class Value:
    """A field of the table; `value` is None if it was not measured, and then `reached` is too."""

    measure: str
    backend: str
    head_dim: int
    value: float | None
    goal: float
    unit: str
    reached: bool | None


def _of(
    rows: Sequence[Row],
    pattern: str,
    density: float | None = None,
    dtype: str = "float32",
    layout: TokenLayout | None = None,
) -> Row:
    wanted = (pattern, dtype, (layout or TOKENS).seq_len)
    for row in rows:
        if (row.pattern, row.dtype, row.tokens) == wanted and (
            density is None or abs(row.density - density) < 0.01
        ):
            return row
    raise LookupError(f"no row of {pattern} {dtype}")


def _extra(row: Row, base: Row) -> float:
    """Percent of time above the base's."""
    return 100 * (row.seconds / base.seconds - 1)


MEASURES = (
    Measure("dense mode vs SDPA float32", lambda r: _of(r, "dense").speedup, (1.28, 1.17), "x"),
    Measure(
        "efficiency at 25 % density", lambda r: _of(r, "blocks", 0.25).efficiency, (1.25, 1.15)
    ),
    Measure("efficiency at 3 % density", lambda r: _of(r, "blocks", 0.03).efficiency, (1.15, 1.05)),
    Measure(
        "vs FlexAttention, same lists, 25 %",
        lambda r: _of(r, "blocks", 0.25).flex_speedup,
        (2.0, 1.9),
        "x",
    ),
    Measure("random columns, 5 %, vs SDPA", lambda r: _of(r, "columns").speedup, (23.0, 21.0), "x"),
    Measure(
        "multi-diagonal w=2 on 8x30x52 tokens, vs SDPA",
        lambda r: _of(r, "diagonals", layout=DIAGONAL_TOKENS).speedup,
        (150.0, 120.0),
        "x",
    ),
    Measure(
        "far field, pool 64, extra on the 25 % plan",
        lambda r: _extra(_of(r, "far"), _of(r, "blocks", 0.25)),
        (8.0, 8.0),
        "%",
        at_most=True,
    ),
    Measure(
        "exact block mass, extra on dense",
        lambda r: _extra(_of(r, "dense blocks+mass"), _of(r, "dense blocks")),
        (1.0, 1.0),
        "%",
        at_most=True,
    ),
    Measure(
        "exact block mass, extra on the 25 % plan",
        lambda r: _extra(_of(r, "blocks+mass"), _of(r, "blocks", 0.25)),
        (1.0, 1.0),
        "%",
        at_most=True,
    ),
    Measure(
        "bfloat16 vs SDPA bfloat16, efficiency at 25 %",
        lambda r: _of(r, "blocks", 0.25, "bfloat16").efficiency,
        (1.3, 1.15),
    ),
)


def run_quick(
    backends: Sequence[str], conditions: Conditions, report: Callable[[str], None]
) -> tuple[list[Row], list[Skipped]]:
    """Measure what the table takes; see `measure`."""
    jobs = [job for head_dim in HEAD_DIMS for job in _jobs(head_dim)]
    weights = [size.layout.seq_len**2 * size.head_dim * len(cases) for size, cases in jobs]
    rows: list[Row] = []
    skipped: list[Skipped] = []
    left = SECONDS
    for number, (size, cases) in enumerate(jobs):
        share = left * weights[number] / sum(weights[number:])
        report(f"measuring {size}")
        started = time.perf_counter()
        more, without = measure(size, cases, backends, conditions, share)
        left -= min(share, time.perf_counter() - started)
        rows += more
        skipped += without
    return rows, skipped


def table(rows: Sequence[Row]) -> list[Value]:
    """The table's fields, of rows of `run_quick`."""
    values = []
    for backend in dict.fromkeys(row.backend for row in rows):
        for place, head_dim in enumerate(HEAD_DIMS):
            found = [r for r in rows if (r.backend, r.head_dim) == (backend, head_dim)]
            for line in MEASURES:
                values.append(_value(line, found, backend, head_dim, line.goals[place]))
    return values


def _value(line: Measure, found: list[Row], backend: str, head_dim: int, goal: float) -> Value:
    try:
        value = line.value(found)
    except LookupError:  # skipped, with a reason that is printed
        value = None
    reached = None
    if value is not None:
        reached = value <= goal if line.at_most else value >= goal
    return Value(line.name, backend, head_dim, value, goal, line.unit, reached)


def _jobs(head_dim: int) -> list[tuple[Size, list[Case]]]:
    """Sizes, and what is timed at each; calls that are compared stand side by side."""
    quarter = random_blocks(TOKENS, HEADS, 0.25, 0)
    far = random_blocks(TOKENS, HEADS, 0.25, 0, far=True)
    whole = dense_blocks(TOKENS, HEADS)
    main = [
        Case("dense blocks", whole),
        Case("dense blocks+mass", whole, mass=True),
        Case("blocks", quarter, flex=True),
        Case("far", far),
        Case("blocks+mass", quarter, mass=True),
        Case("blocks", random_blocks(TOKENS, HEADS, 0.03, 1)),
        Case("columns", columns(TOKENS, HEADS, 0.05, 2)),
    ]
    return [
        (Size(TOKENS, HEADS, head_dim, "float32"), main),
        (Size(TOKENS, HEADS, head_dim, "bfloat16"), [Case("blocks", quarter)]),
        (
            Size(DIAGONAL_TOKENS, HEADS, head_dim, "float32"),
            [Case("diagonals", multi_diagonal(DIAGONAL_TOKENS, HEADS, 2))],
        ),
    ]
