"""A plan at other sizes than the one it was calibrated at: what is said of it, and a row for each."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..generation import Case, GenerationSettings
from ..integrations import workload
from ..layout import TokenLayout
from ..plan import Plan
from .quality import Quality, evaluate


@dataclass(frozen=True)
class SizeRow:
    """A plan's quality and speed at one size.

    Attributes:
        width, height, num_frames: In pixels and frames, as asked for.
        layout: Tokens as text, such as `8x24x24`.
        tokens: Length of the attention's sequence.
        calibrated: Whether the plan was made at this size.
        density, psnr_db, psnr_min_db, psnr_flat_db, ssim: See `Quality`.
        dense_seconds, sparse_seconds, speedup, caution: See `Quality`.
    """

    width: int
    height: int
    num_frames: int
    layout: str
    tokens: int
    calibrated: bool
    density: float
    psnr_db: float
    psnr_min_db: float
    psnr_flat_db: float
    ssim: float | None
    dense_seconds: float
    sparse_seconds: float
    speedup: float
    caution: str | None

    @staticmethod
    def of(plan: Plan, quality: Quality) -> SizeRow:
        """The row of a measured plan."""
        settings = quality.settings
        names = (
            *("tokens", "density", "psnr_db", "psnr_min_db", "psnr_flat_db", "ssim"),
            *("dense_seconds", "sparse_seconds", "speedup", "caution"),
        )
        return SizeRow(
            settings.width,
            settings.height,
            settings.num_frames,
            str(quality.layout or "unknown"),
            calibrated=quality.layout in calibrated_at(plan),
            **{name: getattr(quality, name) for name in names},
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def parse_sizes(text: str) -> list[tuple[int, int, int]]:
    """`"192x192x15,256x256x15"` as `(width, height, frames)` each.

    Raises:
        ValueError: If it has another form, or names a size twice.
    """
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([1-9]\d*)x([1-9]\d*)x([1-9]\d*)\s*", part, flags=re.ASCII)
        if match is None:
            raise ValueError(
                f"sizes must be WIDTHxHEIGHTxFRAMES, comma-separated, got {part!r}; "
                "write 192x192x15,256x256x15"
            )
        width, height, frames = (int(number) for number in match.groups())
        sizes.append((width, height, frames))
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"sizes must name each size once, got {text!r}; leave the second one out")
    return sizes


def evaluate_sizes(
    pipe: Any,
    plan: Plan,
    cases: Sequence[Case],
    settings: GenerationSettings,
    sizes: Sequence[tuple[int, int, int]],
    say: Callable[[str], None],
) -> list[SizeRow]:
    """Measure one plan, unchanged, at several sizes: dense and sparse generations at each.

    Args:
        pipe: A stock pipeline.
        plan: A plan for that pipeline.
        cases: Prompts and seeds, the same at every size.
        settings: Steps and guidance; its size doesn't count.
        sizes: Width, height and frames of each.
        say: Called with a line of text before each step.

    Raises:
        ValueError: If the pipeline can't make one of the sizes; before anything is generated.
    """
    wanted = [replace(settings, width=w, height=h, num_frames=f) for w, h, f in sizes]
    check_sizes(pipe, cases[0], wanted)
    rows = []
    for at in wanted:
        say(f"the plan at {at.width}x{at.height}, {at.num_frames} frames")
        rows.append(SizeRow.of(plan, evaluate(pipe, plan, cases, at, noise_cases=0, progress=say)))
    return rows


def check_sizes(pipe: Any, case: Case, wanted: Sequence[GenerationSettings]) -> None:
    """Raise ValueError if the pipeline can't make one of these sizes."""
    for settings in wanted:
        workload(pipe, settings).check(case)


def calibrated_at(plan: Plan) -> list[TokenLayout]:
    """Sizes that the plan's parts were made at, each once."""
    return list(dict.fromkeys(part.layout for part in plan.components.values()))


def other_size(plan: Plan, layout: TokenLayout | None) -> str | None:
    """A sentence if what was measured isn't the size that the plan was calibrated at, else None.

    Args:
        plan: The plan that was measured.
        layout: The token layout that it was measured at; None if it isn't known.
    """
    known = calibrated_at(plan)
    if layout is None or layout in known:
        return None
    made = " and ".join(_sized(each) for each in known)
    return (
        f"The plan was calibrated at {made}, and is measured here at {_sized(layout)}: "
        "its forecasts are for the size it was calibrated at."
    )


def _sized(layout: TokenLayout) -> str:
    return f"{layout} ({layout.seq_len:,} tokens)"
