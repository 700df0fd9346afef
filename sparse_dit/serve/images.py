"""/v1/images/generations, for pipelines that make images."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool

from .answers import Picture, Pictures
from .card import spec_of
from .errors import invalid, not_found
from .jobs import Job
from .media import IMAGE
from .requests import ImageRequest
from .service import Service
from .videos import refusals


def image_routes(service: Service, limited: Callable[..., Any]) -> APIRouter:
    """The route; for its arguments see `video_routes`."""
    routes = APIRouter(prefix="/v1/images", tags=["images"])

    @routes.post(
        "/generations", dependencies=[Depends(limited)], responses=refusals(404, 413, 422, 429)
    )
    async def generate(asked: ImageRequest, request: Request) -> Pictures:
        """Generate images and wait for them; `n` images have seeds that count up."""
        if service.card.kind != "image":
            raise invalid(f"{service.card.name} makes videos: use /v1/videos")
        jobs = await run_in_threadpool(_submit, service, asked)
        done: list[Job] = []
        for job in jobs:
            try:
                done.append(await service.ended(job.id, "image", request.is_disconnected))
            except BaseException:
                for other in jobs[len(done) :]:
                    await run_in_threadpool(service.store.cancel, other.id)
                raise
        pictures = [await run_in_threadpool(_picture, service, job) for job in done]
        return Pictures(created=int(done[-1].completed_at or 0), data=pictures)

    return routes


def _submit(service: Service, asked: ImageRequest) -> list[Job]:
    first = spec_of(service.card, asked, False, service.options.limits)
    jobs: list[Job] = []
    try:
        for number in range(asked.n):
            jobs.append(service.enqueue(first.model_copy(update={"seed": first.seed + number})))
    except Exception:
        for job in jobs:
            service.store.cancel(job.id)
        raise
    return jobs


def _picture(service: Service, job: Job) -> Picture:
    file = service.files.file(job, IMAGE)
    if file is None:
        raise not_found("the file is gone")
    return Picture(b64_json=base64.b64encode(file.read_bytes()).decode(), seed=job.spec.seed)
