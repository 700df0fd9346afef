"""/v1/videos: submit, and wait for what was submitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool

from .answers import Video, video_of
from .errors import invalid
from .one_job import content_of, refusals
from .requests import VideoRequest, read_job_request
from .service import Service

Key = Annotated[str | None, Header(alias="Idempotency-Key")]


def submission(model: Any, limited: Callable[..., Any]) -> dict[str, Any]:
    """What routes that take a job have in common, for the decorator of a route.

    Args:
        model: The body of a request, as JSON or as a form.
        limited: A dependency that refuses a client who submits too often.
    """
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    fields = {**schema["properties"], "input_reference": {"type": "string", "format": "binary"}}
    content = {
        "application/json": {"schema": schema},
        "multipart/form-data": {"schema": {**schema, "properties": fields}},
    }
    return {
        "dependencies": [Depends(limited)],
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": refusals(409, 413, 415, 422, 429),
    }


def video_routes(service: Service, limited: Callable[..., Any]) -> APIRouter:
    """The routes.

    Args:
        service: What they work on.
        limited: A dependency that refuses a client who submits too often.
    """
    routes = APIRouter(prefix="/v1/videos", tags=["videos"])
    submits = submission(VideoRequest, limited)

    async def submitted(request: Request, key: str | None) -> Any:
        if service.card.kind != "video":
            raise invalid(f"{service.card.name} makes images: use /v1/images")
        asked, upload = await read_job_request(request, VideoRequest)
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
        return content_of(service, job, "video", headers)

    return routes
