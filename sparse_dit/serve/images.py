"""/v1/images: submit, and /v1/images/generations, which waits; for pipelines that make images."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool

from .answers import Picture, Pictures, Video, video_of
from .errors import invalid, not_found
from .jobs import Job
from .media import IMAGE_VARIANTS
from .one_job import refusals
from .requests import ImageRequest, JobRequest, read_job_request
from .service import Service
from .videos import Key, submission


def image_routes(service: Service, limited: Callable[..., Any]) -> APIRouter:
    """The routes; for their arguments see `video_routes`."""
    routes = APIRouter(prefix="/v1/images", tags=["images"])

    def check() -> None:
        if service.card.kind != "image":
            raise invalid(f"{service.card.name} makes videos: use /v1/videos")

    @routes.post("", **submission(JobRequest, limited))
    async def create(request: Request, key: Key = None) -> Video:
        """Put an image into the queue, as a job like those of videos."""
        check()
        asked, upload = await read_job_request(request, JobRequest)
        return video_of(await run_in_threadpool(service.submit, asked, upload, key))

    @routes.post(
        "/generations", dependencies=[Depends(limited)], responses=refusals(404, 413, 422, 429)
    )
    async def generate(asked: ImageRequest, request: Request) -> Pictures:
        """Generate images and wait for them; `n` images have seeds that count up."""
        check()
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
    first = service.pictured.spec_of(asked, False, service.options.limits)
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
    file = service.files.file(job, IMAGE_VARIANTS["image"][0])
    if file is None:
        raise not_found("the file is gone")
    return Picture(b64_json=base64.b64encode(file.read_bytes()).decode(), seed=job.picture.seed)
