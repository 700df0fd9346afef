"""What is asked of jobs that are there, at /v1/videos and at /v1/images: look, cancel, delete, download."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from fastapi.responses import FileResponse, Response

from .answers import Deleted, Page, Video, variants_of, video_of
from .errors import ApiError, ErrorBody, not_found
from .jobs import Job
from .media import has_preview, preview_name, variants
from .service import Service, unfinished
from .spec import Kind

Id = Annotated[str, Path(max_length=64, pattern="^[a-zA-Z0-9_-]+$")]
Variant = Literal["video", "image", "thumbnail", "spritesheet", "dense", "side_by_side"]
CACHED = {"Cache-Control": "private, max-age=3600, immutable"}


def refusals(*codes: int) -> dict[int | str, dict[str, Any]]:
    """What the API's description says of the answers that aren't successes."""
    return {code: {"model": ErrorBody} for code in (400, 401, *codes)}


def job_routes(service: Service, kind: Kind) -> APIRouter:
    """The routes of a kind of job."""
    routes = APIRouter(prefix=f"/v1/{kind}s", tags=[f"{kind}s"])
    result = next(iter(variants(kind)))

    @routes.get("", responses=refusals(404))
    def list_jobs(
        after: Annotated[str | None, Query(max_length=64)] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Page[Video]:
        """Jobs by when they came."""
        jobs, more = service.page(kind, after, limit, order)
        return Page[Video].of([video_of(job, whole=False) for job in jobs], more)

    @routes.get("/{id}", responses=refusals(404))
    def retrieve(id: Id) -> Video:
        """Where a job stands, and what came out."""
        return video_of(service.job(id, kind))

    @routes.delete("/{id}", responses=refusals(404))
    def delete(id: Id) -> Deleted:
        """Remove a job with its files. One that runs ends before its next step."""
        service.delete(id, kind)
        return Deleted(id=id, object="video.deleted" if kind == "video" else "image.deleted")

    @routes.post("/{id}/cancel", responses=refusals(404))
    def cancel(id: Id) -> Video:
        """End a job and keep its record: at once if it waits, before its next step if it runs."""
        return video_of(service.cancel(id, kind))

    @routes.get("/{id}/content", response_class=FileResponse, responses=refusals(404, 422))
    def content(id: Id, variant: Variant | None = None) -> FileResponse:
        """A file of a finished job; its result, unless another variant is asked for."""
        return content_of(service, service.job(id, kind), variant or result, CACHED)

    @routes.get(
        "/{id}/previews/{step}",
        response_class=Response,
        responses={204: {"description": "There is none yet, or none any more"}, **refusals(404)},
    )
    def preview(id: Id, step: Annotated[int, Path(ge=1, le=1 << 20)]) -> Response:
        """The latents after a step as a small WebP picture; the job's `previews` say which steps.

        A job that is cancelled, fails or begins again has none any more: who asks for one that was there
        a moment ago did nothing wrong, and gets an empty answer.
        """
        job = service.job(id, kind)
        picture = service.files.read(job, preview_name(step))
        if picture is not None:
            return Response(picture, media_type="image/webp", headers=CACHED)
        if has_preview(job.picture, step):
            return Response(status_code=204, headers={"Cache-Control": "no-store"})
        raise not_found(f"there is no preview of step {step}")

    return routes


def content_of(service: Service, job: Job, variant: str, headers: dict[str, str]) -> FileResponse:
    """The answer with a file of a job.

    Raises:
        ApiError: If the job isn't finished, or has no such file.
    """
    if job.status != "completed":
        raise unfinished(job)
    known = variants(job.picture.kind)
    if variant not in variants_of(job):
        why = "it was run without compare" if variant in known else f"it makes {job.picture.kind}s"
        raise ApiError(404, "not_found", f"the job has no {variant}: {why}")
    name, media_type = known[variant]
    file = service.files.file(job, name)
    if file is None:
        raise not_found("the file is gone")
    shown = (
        f"{job.id}.{name.rpartition('.')[2]}" if variant == job.spec.kind else f"{job.id}.{name}"
    )
    return FileResponse(
        file,
        media_type=media_type,
        headers=headers,
        filename=shown,
        content_disposition_type="inline",
    )
