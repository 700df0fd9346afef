"""The report of a measured plan: one offline HTML page, the same numbers as JSON, and the videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..plan import Plan
from .atlas import StageAtlas
from .differences import Difference
from .forecasts import Compared, compared
from .quality import Quality
from .sizes import SizeRow
from .teacher import TeacherForced

if TYPE_CHECKING:
    from ..search.front import Front


@dataclass(frozen=True)
class Method:
    """One way to choose patterns, measured on the same cases as the others.

    Attributes:
        name: Short; `uniform` and `random` have keys of their own in `report.json`.
        description: One line of prose.
        density, psnr_db, psnr_min_db, ssim, sparse_seconds, speedup: See `Quality`.
        velocity_error: Teacher-forced, mean over sigmas; None if not measured.
        caution: Why the speed-up says little, if it does.
    """

    name: str
    description: str
    density: float
    psnr_db: float
    psnr_min_db: float
    ssim: float | None
    sparse_seconds: float
    speedup: float
    velocity_error: float | None = None
    caution: str | None = None

    @staticmethod
    def of(
        name: str, description: str, quality: Quality, forced: Sequence[TeacherForced] = ()
    ) -> Method:
        """The row of a measured plan."""
        errors = [entry.velocity_error for entry in forced]
        return Method(
            name=name,
            description=description,
            density=quality.density,
            psnr_db=quality.psnr_db,
            psnr_min_db=quality.psnr_min_db,
            ssim=quality.ssim,
            sparse_seconds=quality.sparse_seconds,
            speedup=quality.speedup,
            velocity_error=sum(errors) / len(errors) if errors else None,
            caution=quality.caution,
        )


@dataclass(frozen=True)
class Report:
    """All that a report shows. What is None or empty is reported as not measured.

    Attributes:
        title: Heading of the page.
        plan: The searched plan.
        quality: What `evaluate` measured for it.
        baselines: The same for other plans: `uniform`, `random`, ...
        teacher_forced: What `teacher_forced` measured for the plan.
        atlases: One for each component and stage, see `stage_atlas`.
        search_seconds: Profiling, choosing and verifying.
        seam_overhead: What the patch itself adds to a dense generation, as a share of it.
        provenance: `environment()` and the command, as text by name.
        notes: Sentences of whoever measured.
        fps: The frames a second that the videos are written with.
        front: Other points of the search that found the plan.
        expected_psnr_db: What the search let expect, see `forecasts.expected_psnr`.
        difference: What another plan does otherwise; None if there is none to compare with.
        sizes: The same plan at other sizes.
    """

    title: str
    plan: Plan
    quality: Quality
    baselines: Sequence[Method] = ()
    teacher_forced: Sequence[TeacherForced] = ()
    atlases: Sequence[StageAtlas] = ()
    search_seconds: float | None = None
    seam_overhead: float | None = None
    provenance: dict[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    fps: float = 8
    front: Front | None = None
    expected_psnr_db: float | None = None
    difference: Difference | None = None
    sizes: Sequence[SizeRow] = ()

    @property
    def forecasts(self) -> list[Compared]:
        """Forecasts beside what was measured."""
        return compared(self.plan, self.quality, self.expected_psnr_db)

    @property
    def search_dense_generations(self) -> float | None:
        """The search's seconds in dense generations of this run; None if it wasn't timed."""
        if self.search_seconds is None:
            return None
        return self.search_seconds / self.quality.dense_seconds

    @property
    def methods(self) -> list[Method]:
        """The searched plan and then its baselines."""
        searched = Method.of("searched", "this plan", self.quality, self.teacher_forced)
        return [searched, *self.baselines]
