"""The files of a report: the page, the same numbers as JSON, the first case's videos, a picture."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..outputs import check_free
from ..whole_file import uninterrupted, write_text
from ..words import option
from .atlas import StageAtlas
from .figures import atlas_figure, save_figure
from .page import opened, render_page
from .report import Report
from .runs import NOISE_FLOOR
from .sentences import findings, limits
from .sizes import calibrated_at
from .video import save_video, side_by_side

VIDEOS = ("dense.mp4", "sparse.mp4", "side_by_side.mp4")
FILES = ("report.html", "report.json", "atlas.png", *VIDEOS)


def write_report(folder: str | Path, report: Report, *, overwrite: bool = False) -> list[Path]:
    """Write `report.html`, `report.json`, the first case's videos and the atlas as a picture.

    Args:
        folder: Made if it isn't there.
        report: What was measured.
        overwrite: Whether files of these names may be replaced.

    Returns:
        The written files.

    Raises:
        FileExistsError: a file is there already and `overwrite` is False; nothing is written then.
    """
    folder = Path(folder)
    if not overwrite:
        check_free("folder", [folder / n for n in FILES], option("overwrite=True"))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as staged:
        _write_files(Path(staged), report)
        with uninterrupted():  # files of two reports side by side would be wrong
            for name in FILES:
                if (Path(staged) / name).exists():
                    os.replace(Path(staged) / name, folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)  # of an earlier report
    return written_files(folder)


def _write_files(folder: Path, report: Report) -> None:
    dense, sparse = report.quality.references[0].video, report.quality.sparse_videos[0]
    clips = (dense, sparse, side_by_side(dense, sparse))
    for name, clip in zip(VIDEOS, clips, strict=True):
        save_video(folder / name, clip, report.fps)
    page = render_page(report, findings(report), limits(report), VIDEOS)
    write_text(
        folder / "report.json", json.dumps(to_json(report), indent=1, allow_nan=False) + "\n"
    )
    write_text(folder / "report.html", page)
    if report.atlases:
        save_figure(atlas_figure(report.atlases[opened(report.atlases)]), folder / "atlas.png")


def written_files(folder: Path) -> list[Path]:
    """Those of a report that are in a folder."""
    return [folder / name for name in FILES if (folder / name).exists()]


def to_json(report: Report) -> dict[str, Any]:
    """`report.json` as a dict of JSON's own types.

    JSON has no infinity and no NaN: such a value is null, and `notes` says which of the two it was
    and where. A PSNR is infinite if the videos are equal in every value.
    """
    quality = report.quality
    by_name = {method.name: method for method in report.baselines}
    data = {
        "title": report.title,
        "tokens": quality.tokens,
        "dense_seconds": quality.dense_seconds,
        "sparse_seconds": quality.sparse_seconds,
        "speedup": quality.speedup,
        "speedup_pairs": quality.pairs.speedups if quality.pairs else [],
        "speedup_caution": quality.caution,
        "forecast_speedup": quality.forecast_speedup,
        "density": quality.density,
        "efficiency": quality.speedup * quality.density,
        "psnr_db": quality.psnr_db,
        "psnr_min_db": quality.psnr_min_db,
        "psnr_flat_db": quality.psnr_flat_db,
        "psnr_noise_floor_db": quality.psnr_noise_floor_db,
        **quality.metrics,
        "psnr_uniform_db": by_name["uniform"].psnr_db if "uniform" in by_name else None,
        "psnr_random_db": by_name["random"].psnr_db if "random" in by_name else None,
        "search_seconds": report.search_seconds,
        "search_dense_generations": report.search_dense_generations,
        "seam_overhead": report.seam_overhead,
        "nonfinite_values": quality.nonfinite,
        "drift": quality.drift,
        "teacher_forced": [asdict(entry) for entry in report.teacher_forced],
        "layout": str(quality.layout) if quality.layout else None,
        "calibrated_layouts": [str(layout) for layout in calibrated_at(report.plan)],
        "forecasts": [entry.to_dict() for entry in report.forecasts],
        "front": _front(report),
        "difference": report.difference.to_dict() if report.difference else None,
        "sizes": [row.to_dict() for row in report.sizes],
        "methods": [asdict(method) for method in report.methods],
        "cases": [asdict(case) for case in quality.cases],
        "settings": quality.settings.to_dict(),
        "noise_floor": NOISE_FLOOR,
        "heads": [_head(atlas, cell) for atlas in report.atlases for cell in _cells(atlas)],
        "ran": quality.summary,
        "provenance": dict(report.provenance),
    }
    notes = [*report.notes, *findings(report), *limits(report)]
    return {**_finite(data, "", notes), "notes": notes}


def _front(report: Report) -> list[dict[str, float | None]]:
    names = ("speedup", "density", "error", "seconds", "psnr")
    points = report.front.points if report.front else ()
    return [{name: getattr(point, name) for name in names} for point in points]


def _cells(atlas: StageAtlas) -> list[Any]:
    return [cell for cells in atlas.layers.values() for cell in cells]


def _head(atlas: StageAtlas, cell: Any) -> dict[str, Any]:
    return {
        "component": atlas.component,
        "stage": atlas.title,
        "layer": cell.layer,
        "head": cell.head,
        "pattern": str(cell.pattern),
        "density": cell.density,
        "error": cell.error,
        "recall": cell.recall,
        "runner_up": None if cell.runner_up is None else str(cell.runner_up),
        "runner_up_error": cell.runner_up_error,
        "prompt_dependent": cell.depends,
    }


def _finite(value: Any, place: str, notes: list[str]) -> Any:
    """The value with null for what JSON can't say, which is added to the notes."""
    if isinstance(value, dict):
        return {k: _finite(v, f"{place}.{k}" if place else k, notes) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v, f"{place}[{i}]", notes) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        meaning = "not a number" if math.isnan(value) else "infinite"
        if meaning == "infinite" and "psnr" in place:
            meaning = "infinite: equal in every value"
        notes.append(f"{place} is null because it is {meaning}")
        return None
    return value
