"""Figures of a report. Curves are SVG that takes the page's text colour; pictures are images.

Every figure has its own Agg canvas, so that a program's own matplotlib backend is left alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..whole_file import whole_file
from .atlas import StageAtlas
from .metrics import Video, as_video
from .pictures import attention_image, mask_image
from .video import captioned, enlarge, to_uint8

_INK = "#0102fe"  # stands for the page's text colour until the SVG is written
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")  # Okabe and Ito
_MARKERS = "osD^vP"


@dataclass(frozen=True)
class Point:
    """One method in the scatter of quality over speed."""

    name: str
    speedup: float
    psnr_db: float


def quality_over_speed(points: Sequence[Point], *, floor_db: float | None = None) -> Figure:
    """Scatter: PSNR against dense over measured speed-up; higher and further right is better.

    Args:
        points: One for each method; those that aren't finite are left out.
        floor_db: PSNR of the flat image, drawn as a line.
    """
    figure, axes = _axes("speed-up over dense (measured)", "PSNR against dense, dB")
    shown = [p for p in points if np.isfinite([p.speedup, p.psnr_db]).all()]
    for number, point in enumerate(shown):
        style = number % len(COLOURS)
        axes.scatter(
            point.speedup, point.psnr_db, s=60, color=COLOURS[style], marker=_MARKERS[style],
            label=point.name, zorder=3,
        )  # fmt: skip
    if floor_db is not None and np.isfinite(floor_db):
        axes.axhline(floor_db, color=_INK, linestyle=":", linewidth=1, label="flat image")
    axes.axvline(1.0, color=_INK, linewidth=0.8, alpha=0.5)
    axes.margins(0.15)
    if shown:
        _legend(axes)
    return figure


def front_curve(
    forecasts: Sequence[tuple[float, float]],
    *,
    promised: Point | None = None,
    measured: Sequence[Point] = (),
    floor_db: float | None = None,
    most_db: float = 60.0,
) -> Figure:
    """PSNR over speed-up: what a search forecasts of all its points, and what was measured.

    Args:
        forecasts: Speed-up and PSNR in dB of each point; those above `most_db` are left out.
        promised: The plan's own forecast, joined with what was measured first.
        measured: The plan, then others; those that aren't finite are left out.
        floor_db: PSNR of the flat image, drawn as a line.
        most_db: The dense end isn't of interest.
    """
    figure, axes = _axes("speed-up over dense", "PSNR against dense, dB")
    shown = sorted(point for point in forecasts if point[1] <= most_db)
    best = [p for p in shown if not any(o[0] > p[0] and o[1] >= p[1] for o in shown)]
    axes.scatter(*_columns(shown), s=8, color=_INK, alpha=0.35)
    axes.plot(*_columns(best), color=_INK, linewidth=1.2, label="forecast of the search")
    known = [p for p in measured if np.isfinite([p.speedup, p.psnr_db]).all()]
    for number, point in enumerate(known):
        style = number % len(COLOURS)
        axes.scatter(
            point.speedup, point.psnr_db, s=60, color=COLOURS[style], marker=_MARKERS[style],
            label=f"{point.name}, measured", zorder=3,
        )  # fmt: skip
    if promised is not None:
        axes.scatter(
            promised.speedup, promised.psnr_db, s=70, facecolors="none", edgecolors=_INK,
            label=f"{promised.name}, forecast", zorder=4,
        )  # fmt: skip
        for point in known[:1]:
            axes.plot(*_columns([promised, point]), color=_INK, linestyle="--", linewidth=0.9)
    if floor_db is not None and np.isfinite(floor_db):
        axes.axhline(floor_db, color=_INK, linestyle=":", linewidth=1, label="flat image")
    _legend(axes)
    return figure


def error_front(points: Sequence[tuple[float, float]]) -> Figure:
    """Forecast error of heads over forecast speed-up, where no PSNR is forecast."""
    figure, axes = _axes("forecast speed-up over dense", "forecast error of heads")
    axes.plot(*_columns(sorted(points)), color=COLOURS[0], marker="o", markersize=4)
    axes.set_ylim(bottom=0)
    return figure


def _columns(points: Sequence[tuple[float, float] | Point]) -> tuple[list[float], list[float]]:
    pairs = [(p.speedup, p.psnr_db) if isinstance(p, Point) else p for p in points]
    return [x for x, _ in pairs], [y for _, y in pairs]


def drift_curve(drifts: Mapping[str, Sequence[float]]) -> Figure:
    """Relative L2 distance of the latents from the dense run's, after each step."""
    figure, axes = _axes("step", "relative distance of the latents")
    moved = any(v > 0 for values in drifts.values() for v in values)
    for number, (name, values) in enumerate(drifts.items()):
        steps = np.arange(1, len(values) + 1)
        shown = [v if np.isfinite(v) and (v > 0 or not moved) else np.nan for v in values]
        style = number % len(COLOURS)
        axes.plot(
            steps, shown, color=COLOURS[style], marker=_MARKERS[style], markersize=4, label=name
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if moved:
        axes.set_yscale("log")
    if drifts:
        _legend(axes)
    return figure


def error_over_sigma(sigmas: Sequence[float], errors: Sequence[float]) -> Figure:
    """Teacher-forced relative error of the velocity over the noise level."""
    figure, axes = _axes("noise level sigma", "relative error of the prediction")
    axes.plot(sigmas, errors, color=COLOURS[0], marker="o")
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    return figure


def frames_strip(dense: Video, sparse: Video, *, frames: int = 6, gain: float = 4.0) -> Image.Image:
    """A picture of a few frames, evenly spread: dense, sparse and their difference below."""
    dense, sparse = as_video(dense), as_video(sparse)
    chosen = np.unique(np.linspace(0, len(dense) - 1, min(frames, len(dense))).round().astype(int))
    difference = np.clip(np.abs(sparse - dense) * gain, 0, 1)
    rows = []
    for name, video in (
        ("dense", dense),
        ("sparse", sparse),
        (f"difference x{gain:g}", difference),
    ):
        panel = enlarge(video[chosen], 128)
        if name == "dense":  # frame numbers above the first row
            panel = np.concatenate(
                [captioned(panel[i : i + 1], f"frame {n}") for i, n in enumerate(chosen)]
            )
        rows.append(np.concatenate(list(panel), axis=1))
    return Image.fromarray(to_uint8(np.concatenate(rows, axis=0)[None])[0])


def atlas_figure(stage: StageAtlas) -> Figure:
    """All heads of a stage: for each its attention beside its mask, with name, density, error."""
    layers = list(stage.layers.items())
    columns = max((len(cells) for _, cells in layers), default=1)
    width, height = 2.6 * columns, 1.75 * len(layers) + 0.5
    figure = Figure(figsize=(width, height), dpi=100)
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.75 / height, wspace=0.05, hspace=0.3)
    FigureCanvasAgg(figure)
    figure.suptitle(f"{stage.component}, {stage.title}: density {stage.density:.3f}", fontsize=9)
    grid = figure.subplots(len(layers), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for row, (layer, cells) in zip(grid, layers, strict=True):
        for axes, cell in zip(row, cells, strict=False):
            pictures = [np.asarray(mask_image(cell.mask).resize((96, 96), Image.Resampling.BOX))]
            if cell.attention is not None:
                seen = attention_image(cell.attention).resize((96, 96), Image.Resampling.BOX)
                pictures = [np.asarray(seen), np.full((96, 6, 3), 255, np.uint8), *pictures]
            axes.imshow(np.concatenate(pictures, axis=1), interpolation="nearest")
            error = "" if cell.error is None else f", error {cell.error:.3f}"
            axes.set_title(
                f"{layer} head {cell.head}\n{cell.pattern.name}, density {cell.density:.2f}{error}",
                fontsize=6,
            )
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure on white, in the format of its file's ending, whole or not at all."""
    with whole_file(path) as partial:
        figure.savefig(partial, facecolor="white")


def to_svg(figure: Figure, name: str, label: str) -> str:
    """A figure as an inline SVG: text stays text, ink takes the page's text colour.

    Args:
        figure: What to draw.
        name: Unique on the page; element ids derive from it.
        label: What a screen reader says.
    """
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    head = f'<svg role="img" aria-label="{label}" '
    return re.sub(
        r'<svg (.*?)width="[^"]*"(.*?)height="[^"]*"', rf"{head}\1\2", svg, count=1, flags=re.S
    )


def _axes(x: str, y: str):  # a figure of one plot in the page's ink
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.tick_params(colors=_INK, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)
    axes.grid(color=_INK, alpha=0.15, linewidth=0.6)
    return figure, axes


def _legend(axes) -> None:
    axes.legend(frameon=False, labelcolor=_INK, fontsize=8)
