"""/v1/videos: submit, look, cancel, delete, download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from fastapi.responses import FileResponse, Response
from starlette.concurrency import run_in_threadpool

from .answers import Deleted, Video, VideoList, variants_of, video_of
from .errors import ApiError, ErrorBody, invalid, not_found
from .media import VARIANTS, preview_name
from .requests import VideoRequest, read_video_request
from .service import Service, unfinished

Id = Annotated[str, Path(max_length=64, pattern="^[a-zA-Z0-9_-]+$")]
Key = Annotated[str | None, Header(alias="Idempotency-Key")]
Variant = Literal["video", "thumbnail", "spritesheet", "dense", "side_by_side"]
CACHED = {"Cache-Control": "private, max-age=3600, immutable"}


def refusals(*codes: int) -> dict[int | str, dict[str, Any]]:
    """What the API's description says of the answers that aren't successes."""
    return {code: {"model": ErrorBody} for code in (400, 401, *codes)}


def body(model: Any, *, form: bool) -> dict[str, Any]:
    """What the API's description says of the body of a request."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    content = {"application/json": {"schema": schema}}
    if form:
        fields = {**schema["properties"]}
        if "input_reference" in fields:
            fields["input_reference"] = {"type": "string", "format": "binary"}
        content["multipart/form-data"] = {"schema": {**schema, "properties": fields}}
    return {"requestBody": {"required": True, "content": content}}


def video_routes(service: Service, limited: Callable[..., Any]) -> APIRouter:
    """The routes.

    Args:
        service: What they work on.
        limited: A dependency that refuses a client who submits too often.
    """
    routes = APIRouter(prefix="/v1/videos", tags=["videos"])
    submits = {
        "dependencies": [Depends(limited)],
        "openapi_extra": body(VideoRequest, form=True),
        "responses": refusals(409, 413, 415, 422, 429),
    }

    async def submitted(request: Request, key: str | None) -> Any:
        if service.card.kind != "video":
            raise invalid(f"{service.card.name} makes images: use /v1/images/generations")
        asked, upload = await read_video_request(request)
        return await run_in_threadpool(service.submit, asked, upload, key)

    @routes.post("", **submits)
    async def create(request: Request, key: Key = None) -> Video:
        """Put a video into the queue."""
        return video_of(await submitted(request, key))

    @routes.post("/sync", response_class=FileResponse, **submits)
    async def create_and_wait(request: Request, key: Key = None) -> FileResponse:
        """Generate a video and answer with its file. The job is cancelled if the client goes away."""
        job = await submitted(request, key)
        job = await service.ended(job.id, "video", request.is_disconnected)
        seconds = (job.result or {}).get("inference_seconds", 0)
        headers = {"X-Request-Id": job.id, "X-Model": job.model, "X-Inference-Time-S": str(seconds)}
        return _file(service, job, "video", headers)

    @routes.get("", responses=refusals(404))
    def list_videos(
        after: Annotated[str | None, Query(max_length=64)] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoList:
        """Jobs by when they came."""
        found = service.store.list("video", after=after, limit=limit, order=order)
        if found is None:
            raise not_found(f"there is no video {after:.80}")
        jobs, more = found
        data = [video_of(job, whole=False) for job in jobs]
        ends = (data[0].id, data[-1].id) if data else (None, None)
        return VideoList(data=data, first_id=ends[0], last_id=ends[1], has_more=more)

    @routes.get("/{video_id}", responses=refusals(404))
    def retrieve(video_id: Id) -> Video:
        """Where a job stands, and what came out."""
        return video_of(service.job(video_id))

    @routes.delete("/{video_id}", responses=refusals(404))
    def delete(video_id: Id) -> Deleted:
        """Remove a job with its files. One that runs ends before its next step."""
        service.delete(video_id)
        return Deleted(id=video_id)

    @routes.post("/{video_id}/cancel", responses=refusals(404))
    def cancel(video_id: Id) -> Video:
        """End a job and keep its record: at once if it waits, before its next step if it runs."""
        service.job(video_id)
        job = service.store.cancel(video_id)
        if job is None:
            raise not_found(f"there is no video {video_id}")
        return video_of(job)

    @routes.get("/{video_id}/content", response_class=FileResponse, responses=refusals(404, 422))
    def content(video_id: Id, variant: Variant = "video") -> FileResponse:
        """A file of a finished job."""
        return _file(service, service.job(video_id), variant, CACHED)

    @routes.get("/{video_id}/previews/{step}", response_class=Response, responses=refusals(404))
    def preview(video_id: Id, step: Annotated[int, Path(ge=1, le=1 << 20)]) -> Response:
        """The latents after a step as a small WebP picture; the job's `previews` say which steps."""
        picture = service.files.read(service.job(video_id), preview_name(step))
        if picture is None:
            raise not_found(f"there is no preview of step {step}")
        return Response(picture, media_type="image/webp", headers=CACHED)

    return routes


def _file(service: Service, job: Any, variant: str, headers: dict[str, str]) -> FileResponse:
    if job.status != "completed":
        raise unfinished(job)
    if variant not in variants_of(job):
        raise ApiError(404, "not_found", f"the job has no {variant}: it was run without compare")
    name, kind = VARIANTS[variant]
    file = service.files.file(job, name)
    if file is None:
        raise not_found("the file is gone")
    shown = f"{job.id}.{name.rpartition('.')[2]}" if variant == "video" else f"{job.id}.{name}"
    return FileResponse(
        file, media_type=kind, headers=headers, filename=shown, content_disposition_type="inline"
    )
