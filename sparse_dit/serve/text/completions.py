"""/v1/completions: write and wait, or watch; and look at what was written, cancel or remove it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from ..answers import Page
from ..one_job import Id, refusals
from ..service import Service
from ..videos import Key
from .answers import Completion, CompletionDeleted, completion_of
from .requests import CompletionRequest, StreamOptions
from .stream import events

STREAM = {"content": {"text/event-stream": {}}, "description": "A completion, or its chunks."}
UNBUFFERED = {"X-Accel-Buffering": "no"}  # or nginx keeps a stream back


def completion_routes(service: Service, limited: Callable[..., Any]) -> APIRouter:
    """The routes.

    Args:
        service: What they work on.
        limited: A dependency that refuses a client who submits too often.
    """
    routes = APIRouter(prefix="/v1/completions", tags=["completions"])

    @routes.post(
        "",
        dependencies=[Depends(limited)],
        response_model=Completion,
        responses={200: STREAM, **refusals(404, 409, 413, 422, 429)},
    )
    async def create(asked: CompletionRequest, request: Request, key: Key = None) -> Any:
        """Go on with a text, and answer with what was written, or with a stream while it is.

        The job is cancelled if the client goes away, unless it gave an Idempotency-Key: the same request with
        the same key then gets what was written meanwhile.
        """
        job = await run_in_threadpool(service.submit, asked, None, key)
        gone = request.is_disconnected if key is None else _never
        if asked.stream:
            options = asked.stream_options or StreamOptions()
            told = events(service, job, options, request.is_disconnected, key is not None)
            return StreamingResponse(told, media_type="text/event-stream", headers=UNBUFFERED)
        return completion_of(await service.ended(job.id, "text", gone))

    @routes.get("", responses=refusals(404))
    def list_jobs(
        after: Annotated[str | None, Query(max_length=64)] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Page[Completion]:
        """Jobs by when they came."""
        jobs, more = service.page("text", after, limit, order)
        return Page[Completion].of([completion_of(job, whole=False) for job in jobs], more)

    @routes.get("/{id}", responses=refusals(404))
    def retrieve(id: Id) -> Completion:
        """Where a job stands, and what was written."""
        return completion_of(service.job(id, "text"))

    @routes.delete("/{id}", responses=refusals(404))
    def delete(id: Id) -> CompletionDeleted:
        """Remove a job with what it wrote. One that runs ends before its next step."""
        service.delete(id, "text")
        return CompletionDeleted(id=id)

    @routes.post("/{id}/cancel", responses=refusals(404))
    def cancel(id: Id) -> Completion:
        """End a job and keep its record: at once if it waits, before its next step if it runs."""
        return completion_of(service.cancel(id, "text"))

    return routes


async def _never() -> bool:
    return False
