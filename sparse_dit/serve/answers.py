"""What the server says: the bodies of answers."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel

from .jobs import Job, Status
from .media import variants
from .spec import Kind

Item = TypeVar("Item", bound=Any)


class Page(BaseModel, Generic[Item]):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, data: list[Item], more: bool) -> Page[Item]:
        """The page with these, behind which there are more or not."""
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return cls(data=data, first_id=first, last_id=last, has_more=more)


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class Video(BaseModel):
    """A job of a video or an image, in the shape of OpenAI's videos with what this server knows beside it.

    `progress` is in percent, times are in seconds since 1970, `seconds` is the length as text. `step` counts
    the steps of all generations of the job. `variants` are what /content has by now.
    """

    id: str
    object: Kind = "video"
    model: str
    status: Status
    progress: int
    created_at: int
    started_at: int | None
    completed_at: int | None
    expires_at: int | None
    prompt: str
    seconds: str
    size: str
    remixed_from_video_id: str | None = None
    error: JobError | None
    # beyond that shape
    seed: int
    negative_prompt: str | None
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    plan: str
    speedup: float | None
    compare: bool
    attempt: int
    cancelling: bool
    queue_position: int | None
    phase: str | None
    step: int
    steps: int
    seconds_left: float | None
    previews: list[int]
    variants: list[str]
    file_name: str | None
    inference_time_s: float | None
    dense_time_s: float | None
    total_time_s: float | None
    psnr_db: float | None
    ssim: float | None
    density: float | None
    summary: dict[str, Any] | None


class Deleted(BaseModel):
    """A job that is gone."""

    id: str
    object: Literal["video.deleted", "image.deleted"] = "video.deleted"
    deleted: bool = True


class Picture(BaseModel):
    """One image."""

    b64_json: str
    seed: int


class Pictures(BaseModel):
    """The answer of /v1/images/generations."""

    created: int
    data: list[Picture]


def video_of(job: Job, *, whole: bool = True) -> Video:
    """What is said of a job.

    Args:
        job: The job.
        whole: Whether the summary of what ran is in it; lists leave it out.
    """
    spec, result = job.picture, job.result or {}
    detail = job.detail if job.status == "in_progress" else {}
    shown = job.error if job.status == "failed" else None
    return Video(
        id=job.id,
        object=spec.kind,
        model=job.model,
        status=job.status,
        progress=job.progress,
        created_at=int(job.created_at),
        started_at=_time(job.started_at),
        completed_at=_time(job.completed_at),
        expires_at=_time(job.expires_at),
        prompt=spec.prompt,
        seconds=f"{spec.num_frames / spec.fps:.4g}",
        size=f"{spec.width}x{spec.height}",
        error=None if shown is None else JobError(**shown),
        seed=spec.seed,
        negative_prompt=spec.negative_prompt,
        num_frames=spec.num_frames,
        fps=spec.fps,
        num_inference_steps=spec.steps,
        guidance_scale=spec.guidance,
        plan=spec.plan,
        speedup=spec.speedup,
        compare=spec.compare,
        attempt=job.attempt,
        cancelling=job.cancel and not job.ended,
        queue_position=None if job.ahead is None else job.ahead + 1,
        phase=detail.get("phase"),
        step=detail.get("step", 0) if job.status != "completed" else spec.total_steps,
        steps=spec.total_steps,
        seconds_left=detail.get("seconds_left"),
        previews=detail.get("previews") or result.get("previews") or [],
        variants=variants_of(job),
        file_name=_main_file(job) if job.status == "completed" else None,
        inference_time_s=result.get("inference_seconds"),
        dense_time_s=result.get("dense_seconds"),
        total_time_s=result.get("seconds"),
        psnr_db=result.get("psnr_db"),
        ssim=result.get("ssim"),
        density=result.get("density"),
        summary=result.get("summary") if whole else None,
    )


def variants_of(job: Job) -> list[str]:
    """What /content has of a job."""
    if job.status != "completed":
        return []
    needless = () if job.picture.compare else ("dense", "side_by_side")
    return [name for name in variants(job.picture.kind) if name not in needless]


def _main_file(job: Job) -> str:
    return next(iter(variants(job.picture.kind).values()))[0]


def _time(value: float | None) -> int | None:
    return None if value is None else int(value)
