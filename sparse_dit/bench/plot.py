"""Speed-up over sparsity as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from ..whole_file import whole_file
from .rows import Row

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")  # Okabe and Ito
MARKERS = "osD^vP"
STYLES = ("-", "--", "-.", (0, (1, 4)))
FLEX = "FlexAttention"


class _Line(NamedTuple):
    """What the points of a line share."""

    who: str
    pattern: str
    head_dim: int
    tokens: int
    dtype: str


def save_plot(rows: Sequence[Row], path: Path, baseline: str = "dense SDPA") -> None:
    """Speed-up over the baseline against 1 / density, both logarithmic, as PNG.

    One line for each backend, pattern and head_dim (and size and dtype, where they vary): colours are
    patterns, strokes backends (dotted: FlexAttention), markers head_dims. And the line on which a pair
    costs what it costs in SDPA.
    """
    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)  # of its own, so that a program's matplotlib backend is left alone
    axes = figure.add_subplot()
    lines = _lines(rows)
    patterns = list(dict.fromkeys(line.pattern for line in lines))
    backends = list(dict.fromkeys(line.who for line in lines if line.who != FLEX))
    dims = list(dict.fromkeys(line.head_dim for line in lines))
    for line, points in lines.items():
        x, y = zip(*sorted(points), strict=True)
        stroke = ":" if line.who == FLEX else STYLES[backends.index(line.who) % len(STYLES)]
        axes.plot(
            x, y, label=_label(line, lines), linestyle=stroke, markersize=5,
            color=COLOURS[patterns.index(line.pattern) % len(COLOURS)],
            marker=MARKERS[dims.index(line.head_dim) % len(MARKERS)],
        )  # fmt: skip
    end = max((1 / row.density for row in rows), default=1.0)
    axes.plot([1, end], [1, end], color="black", linewidth=0.8, label="ideal: 1 / density")
    _scales(axes, baseline)
    figure.legend(loc="outside right upper", fontsize=7)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _lines(rows: Sequence[Row]) -> dict[_Line, list[tuple[float, float]]]:
    """Points `(1 / density, speed-up)` by line; those at density 1 stand alone."""
    lines: dict[_Line, list[tuple[float, float]]] = {}
    for row in rows:
        if row.pattern.startswith("dense blocks") or row.pattern.endswith("+mass"):
            continue
        for who, seconds in ((row.backend, row.seconds), (FLEX, row.flex_seconds)):
            if seconds is not None:
                line = _Line(who, row.pattern, row.head_dim, row.tokens, row.dtype)
                point = (1 / row.density, row.sdpa_seconds / seconds)
                points = lines.setdefault(line, [])
                if point not in points:  # FlexAttention's is in the rows of every backend
                    points.append(point)
    return lines


def _label(line: _Line, lines: dict[_Line, list[tuple[float, float]]]) -> str:
    words = [line.who, line.pattern, f"head_dim {line.head_dim}"]
    if len({other.tokens for other in lines}) > 1:
        words.append(f"{line.tokens} tokens")
    if len({other.dtype for other in lines}) > 1:
        words.append(line.dtype)
    return ", ".join(words)


def _scales(axes: Axes, baseline: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("1 / density")
    axes.set_ylabel(f"speed-up over {baseline}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
