"""The report as one HTML page that needs no network and no file but the videos beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from .atlas import HeadCell, StageAtlas
from .figures import (
    Point,
    drift_curve,
    error_front,
    error_over_sigma,
    frames_strip,
    front_curve,
    quality_over_speed,
    to_svg,
)
from .metrics import METRICS
from .pictures import attention_image, data_uri, mask_image
from .report import Report
from .sizes import other_size
from .video import enlarge, side_by_side, to_uint8

MANY_HEADS = 200  # beyond it pictures are half the size, so that the page stays a few megabytes
LINE_LIMIT = 300  # lines of a difference to another plan that are shown
NONE = "not measured"


def render_page(
    report: Report, findings: Sequence[str], limits: Sequence[str], videos: Sequence[str]
) -> str:
    """The page's HTML.

    Args:
        report: What to show.
        findings, limits: Sentences.
        videos: File names of the dense, the sparse and the side-by-side video, beside the page.
    """
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            quality=report.quality,
            metrics=METRICS,
            findings=findings,
            limits=limits,
            clips=_clips(report, videos),
            strips=_strips(report),
            scatter=_scatter(report),
            front=_front(report),
            drift=_drift(report),
            other_size=other_size(report.plan, report.quality.layout),
            line_limit=LINE_LIMIT,
            forced=_forced(report),
            atlases=pictured(report.atlases),
            opened=opened(report.atlases),
        )
    )


def environment(*packages: str) -> Environment:
    """The templates, with filters that write numbers.

    Args:
        packages: Packages whose own templates are looked for before these.
    """
    made = Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in (*packages, "sparse_dit.eval")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        db=decibels,
        seconds=seconds,
        times=times,
        share=share,
        small_share=small_share,
        number=number,
    )
    made.filters["of_kind"] = of_kind
    return made


def decibels(value: float | None) -> str:
    """A PSNR in words of at most one decimal."""
    if value is None:
        return NONE
    return "NaN" if math.isnan(value) else "equal" if value == math.inf else f"{value:.1f} dB"


def seconds(value: float | None) -> str:
    """A duration."""
    return NONE if value is None else f"{value:.2f} s"


def times(value: float | None) -> str:
    """A ratio such as a speed-up."""
    return NONE if value is None else f"{value:.2f}x"


def share(value: float | None) -> str:
    """A fraction in percent."""
    return NONE if value is None else f"{100 * value:.1f} %"


def small_share(value: float | None) -> str:
    """A fraction of about a thousandth in percent, two digits."""
    return NONE if value is None else f"{100 * value:.2g} %"


def number(value: float | None) -> str:
    """A plain number, three digits."""
    return NONE if value is None else f"{value:.3g}"


def of_kind(value: float | None, kind: str) -> str:
    """A number as `Compared.kind` says; "-" for None."""
    write = {"times": times, "seconds": seconds, "share": share, "decibels": decibels}[kind]
    return "-" if value is None else write(value)


def _clips(report: Report, names: Sequence[str]) -> list[dict[str, str]]:
    dense, sparse = report.quality.references[0].video, report.quality.sparse_videos[0]
    both = side_by_side(dense[:1], sparse[:1])
    labels = ("dense", "sparse", "dense, sparse, and their difference times 4")
    first = (enlarge(dense[:1], 256), enlarge(sparse[:1], 256), both)
    return [
        {"file": name, "label": label, "poster": data_uri(_image(frame), "jpeg")}
        for name, label, frame in zip(names, labels, first, strict=True)
    ]


def _image(video: Any) -> Image.Image:
    return Image.fromarray(to_uint8(video)[0])


def _strips(report: Report) -> list[dict[str, Any]]:
    quality = report.quality
    return [
        {"case": case, "uri": data_uri(frames_strip(dense.video, sparse), "jpeg")}
        for case, dense, sparse in zip(
            quality.cases, quality.references, quality.sparse_videos, strict=True
        )
    ]


def _scatter(report: Report) -> Markup:
    points = [Point(m.name, m.speedup, m.psnr_db) for m in report.methods]
    figure = quality_over_speed(points, floor_db=report.quality.psnr_flat_db)
    return Markup(
        to_svg(figure, "scatter", "PSNR over measured speed-up, one mark for each method")
    )


def _front(report: Report) -> Markup | None:
    """Forecasts of the whole search, with what was measured where both are PSNR."""
    if report.front is None:
        return None
    points = report.front.points
    known = [(p.speedup, p.psnr) for p in points if p.psnr is not None]
    if not known:
        figure = error_front([(p.speedup, p.error) for p in points])
        return Markup(to_svg(figure, "frontier", "Forecast error of heads over forecast speed-up"))
    quality, expected = report.quality, report.expected_psnr_db
    promised = None
    if expected is not None and quality.forecast_speedup is not None:
        promised = Point("searched", quality.forecast_speedup, expected)
    figure = front_curve(
        known,
        promised=promised,
        measured=[Point(m.name, m.speedup, m.psnr_db) for m in report.methods],
        floor_db=quality.psnr_flat_db,
    )
    return Markup(
        to_svg(figure, "frontier", "PSNR over speed-up: forecast of the search, and measured")
    )


def _drift(report: Report) -> Markup:
    curves = {
        f"case {i}, seed {c.case.seed}": c.drift for i, c in enumerate(report.quality.cases, 1)
    }
    return Markup(
        to_svg(drift_curve(curves), "drift", "Distance of the latents from dense over steps")
    )


def _forced(report: Report) -> Markup | None:
    entries = sorted(report.teacher_forced, key=lambda entry: entry.sigma)
    if len(entries) < 2:
        return None
    figure = error_over_sigma([e.sigma for e in entries], [e.velocity_error for e in entries])
    return Markup(to_svg(figure, "forced", "Teacher-forced error over the noise level"))


def pictured(atlases: Sequence[StageAtlas]) -> list[dict[str, Any]]:
    """Atlases with their pictures inside of URIs, as `atlas.html.j2` shows them."""
    heads = sum(len(cells) for atlas in atlases for cells in atlas.layers.values())
    side = 96 if heads <= MANY_HEADS else 48
    return [_atlas(atlas, side) for atlas in atlases]


def _atlas(atlas: StageAtlas, side: int) -> dict[str, Any]:
    masks: dict[int, str] = {}
    layers = {
        layer: [_cell(cell, side, masks) for cell in cells] for layer, cells in atlas.layers.items()
    }
    return {"atlas": atlas, "layers": layers, "side": side}


def _cell(cell: HeadCell, side: int, masks: dict[int, str]) -> dict[str, Any]:
    if id(cell.mask) not in masks:  # heads that share a pattern share its mask
        masks[id(cell.mask)] = data_uri(_shrunk(mask_image(cell.mask), side))
    seen = None if cell.attention is None else attention_image(cell.attention, side)
    return {
        "cell": cell,
        "mask": masks[id(cell.mask)],
        "attention": None if seen is None else data_uri(seen),
    }


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.BOX) if image.width > side else image


def opened(atlases: Sequence[StageAtlas]) -> int:
    """Which stage is shown unfolded: the first that isn't dense."""
    return next((i for i, atlas in enumerate(atlases) if atlas.density < 1), 0)
