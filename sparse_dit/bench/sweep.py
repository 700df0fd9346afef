"""The long benchmark: tokens x head_dim x dtype x pattern x density."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..layout import TokenLayout
from .kernel import DTYPES, Case, Conditions, Size, measure
from .lists import build, layout_of
from .rows import Row, Skipped


@dataclass(frozen=True)
class Sweep:
    """What is varied; `heads` is the same throughout."""

    layouts: Sequence[TokenLayout]
    head_dims: Sequence[int]
    densities: Sequence[float]
    dtypes: Sequence[str]
    patterns: Sequence[str]
    heads: int

    @staticmethod
    def of(
        tokens: Sequence[str],
        head_dims: Sequence[int],
        densities: Sequence[float],
        dtypes: Sequence[str],
        patterns: Sequence[str],
        heads: int,
    ) -> Sweep:
        """Checked, so that nothing is wrong after half of the measurement.

        Raises:
            ValueError: If a pattern or dtype is unknown, a density isn't in (0, 1], or tokens can't be
                read.
        """
        for dtype in dtypes:
            if dtype not in DTYPES:
                raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        small = layout_of("64")
        for pattern, density in itertools.product(patterns, densities):
            build(pattern, small, 1, density, 0)
        layouts = [layout_of(text) for text in tokens]
        return Sweep(layouts, head_dims, densities, dtypes, patterns, heads)


def run_sweep(
    sweep: Sweep, backends: Sequence[str], conditions: Conditions, report: Callable[[str], None]
) -> tuple[list[Row], list[Skipped]]:
    """Measure all combinations; those that share tensors are timed in the same rounds."""
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for layout, head_dim, dtype in itertools.product(sweep.layouts, sweep.head_dims, sweep.dtypes):
        size = Size(layout, sweep.heads, head_dim, dtype)
        report(f"measuring {size}")
        cases = [
            Case(pattern, build(pattern, layout, sweep.heads, density, seed), flex=True)
            for pattern in sweep.patterns
            for seed, density in enumerate(sweep.densities)
        ]
        more, without = measure(size, cases, backends, conditions)
        rows += more
        skipped += without
    return rows, skipped
