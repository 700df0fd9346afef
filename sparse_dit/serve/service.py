"""What the parts of the API share: the store, the files, what is served."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from starlette.concurrency import run_in_threadpool

from .card import Card
from .errors import ApiError, not_found
from .files import Files
from .jobs import Job, Spec, new_id
from .options import ServeOptions
from .requests import fingerprint
from .spec import AnyKind
from .store import OtherRequest, QueueFull, Store
from .text.card import TextCard

WAIT = 0.1  # seconds between two looks at a job that a client waits for
RETRY_AFTER = 10  # seconds, where nothing is known of how long jobs take
MOST_KEY = 200  # characters
logger = logging.getLogger("sparse_dit.serve")


@dataclass(frozen=True)
class Service:
    """A server without HTTP.

    Args:
        store: The queue.
        files: What jobs made.
        card: What is served.
        options: What the server was started with.
    """

    store: Store
    files: Files
    card: Card | TextCard
    options: ServeOptions

    @property
    def pictured(self) -> Card:
        """What is served, if that makes videos or images."""
        assert isinstance(self.card, Card)
        return self.card

    def submit(self, asked: Any, upload: bytes | None, key: str | None) -> Job:
        """Put a request into the queue.

        Args:
            asked: The body of a request, of what the card makes.
            upload: The image that came with it.
            key: Idempotency key.

        Raises:
            ApiError: If it can't be met, or the queue is full.
        """
        if key is not None and not (0 < len(key) <= MOST_KEY and key.isascii()):
            raise ApiError(
                400,
                "invalid_request",
                f"Idempotency-Key must be 1 to {MOST_KEY} ASCII characters",
            )
        spec = self.card.spec_of(asked, upload is not None, self.options.limits)
        job = self.enqueue(spec, upload, key, fingerprint(asked, upload))
        prompt = f" {spec.prompt!r}" if self.options.log_prompts else ""
        logger.info("job %s: plan %s, %s%s", job.id, spec.plan, spec.size, prompt)
        return job

    def enqueue(
        self, spec: Spec, upload: bytes | None = None, key: str | None = None, mark: str = ""
    ) -> Job:
        """Put a job at the end of the queue.

        Raises:
            ApiError: If the queue is full, or the key came with another request.
        """
        id = new_id(spec.kind)
        if upload is not None:  # before the job, which may be begun at once
            self.files.keep_upload(id, upload)
        try:
            job, new = self.store.submit(
                spec,
                self.card.name,
                limit=self.options.queue_size,
                ttl=self.options.ttl,
                key=key,
                fingerprint=mark,
                id=id,
            )
        except QueueFull as error:
            self.files.remove(id)
            wait = {"Retry-After": str(RETRY_AFTER)}
            raise ApiError(429, "queue_full", f"{error}; try again later", headers=wait) from None
        except OtherRequest:
            self.files.remove(id)
            raise ApiError(
                409, "idempotency_conflict", "this Idempotency-Key came with another request"
            ) from None
        if not new and upload is not None:
            self.files.remove(id)
        return job

    def job(self, id: str, kind: AnyKind) -> Job:
        """The job of an id.

        Raises:
            ApiError: If there is none.
        """
        job = self.store.get(id, kind)
        if job is None:
            raise not_found(f"there is no {kind} {id:.80}")
        return job

    def page(
        self, kind: AnyKind, after: str | None, limit: int, order: Literal["asc", "desc"]
    ) -> tuple[list[Job], bool]:
        """Jobs of a kind by when they came, and whether there are more.

        Raises:
            ApiError: If there is no job `after`.
        """
        found = self.store.list(kind, after=after, limit=limit, order=order)
        if found is None:
            raise not_found(f"there is no {kind} {after:.80}")
        return found

    def cancel(self, id: str, kind: AnyKind) -> Job:
        """End a job and keep its record; see `Store.cancel`.

        Raises:
            ApiError: If there is none.
        """
        self.job(id, kind)
        job = self.store.cancel(id)
        if job is None:
            raise not_found(f"there is no {kind} {id}")
        return job

    def delete(self, id: str, kind: AnyKind) -> None:
        """Remove a job with its files; one that runs ends before its next step.

        Raises:
            ApiError: If there is none.
        """
        self.job(id, kind)
        self.store.delete(id)
        self.files.remove(id)

    async def ended(self, id: str, kind: AnyKind, gone: Callable[[], Awaitable[bool]]) -> Job:
        """The job of an id when it has ended; it is cancelled if the client goes away.

        Raises:
            ApiError: If it is deleted meanwhile, was cancelled, or failed.
        """
        while not (job := await run_in_threadpool(self.job, id, kind)).ended:
            if await gone():
                await run_in_threadpool(self.store.cancel, id)
                raise ApiError(499, "client_closed_request", "the client went away")
            await asyncio.sleep(WAIT)
        if job.status != "completed":
            raise unfinished(job)
        return job


def unfinished(job: Job) -> ApiError:
    """Why there is nothing to get of a job."""
    if job.status == "failed" and job.error:
        return ApiError(422, job.error["code"], f"the job failed: {job.error['message']}")
    if job.status == "cancelled":
        return not_found("the job was cancelled")
    return ApiError(404, "not_ready", f"the job is {job.status.replace('_', ' ')}: ask again later")
