"""A job as the store knows it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from pydantic import Field, TypeAdapter

from .spec import JobSpec, TextSpec
from .tables import JOBS

Spec = JobSpec | TextSpec
Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
ENDED = ("completed", "failed", "cancelled")
_SPEC: TypeAdapter[Spec] = TypeAdapter(Annotated[Spec, Field(discriminator="kind")])


@dataclass(frozen=True)
class Job:
    """One row of the queue.

    Attributes:
        seq: Its place in the order in which jobs came.
        id: What the API calls it; it can't be guessed.
        attempt: How often it was begun.
        crashes: How often a worker ended while it ran it.
        progress: Percent.
        detail: Where it stands: phase, step, seconds left, previews.
        result: What came out: seconds, quality, what ran, files.
        error: Code and message; of a job that was begun again, those of the crash before.
        ahead: Jobs that are queued before it; None unless it is queued.
    """

    seq: int
    id: str
    model: str
    spec: Spec
    status: Status
    cancel: bool
    created_at: float
    started_at: float | None
    completed_at: float | None
    expires_at: float | None
    worker: str | None
    attempt: int
    crashes: int
    progress: int
    detail: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    ahead: int | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in ENDED

    @property
    def picture(self) -> JobSpec:
        """What it generates, if that is a video or an image."""
        assert isinstance(self.spec, JobSpec)
        return self.spec

    @property
    def text(self) -> TextSpec:
        """What it generates, if that is text."""
        assert isinstance(self.spec, TextSpec)
        return self.spec


def new_id(kind: str) -> str:
    """An id with 128 random bits."""
    return f"{kind}_{secrets.token_hex(16)}"


_EARLIER = JOBS.alias("earlier")
_AHEAD = (
    sa.select(sa.func.count())
    .select_from(_EARLIER)
    .where(_EARLIER.c.status == "queued", _EARLIER.c.seq < JOBS.c.seq)
    .scalar_subquery()
)
_COLUMNS = [
    *(JOBS.c.seq, JOBS.c.id, JOBS.c.model, JOBS.c.status, JOBS.c.cancel, JOBS.c.created_at),
    *(JOBS.c.started_at, JOBS.c.completed_at, JOBS.c.expires_at, JOBS.c.worker, JOBS.c.attempt),
    *(JOBS.c.crashes, JOBS.c.progress, JOBS.c.detail, JOBS.c.result, JOBS.c.error),
]
SELECT = sa.select(
    *_COLUMNS, JOBS.c.spec, sa.case((JOBS.c.status == "queued", _AHEAD)).label("ahead")
)


def job_of(row: Any) -> Job:
    """The job of a row of `SELECT`, which may have more columns."""
    values = {part.name: row._mapping[part.name] for part in fields(Job)}
    return Job(**{**values, "spec": _SPEC.validate_json(values["spec"])})
