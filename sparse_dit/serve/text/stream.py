"""A text as a stream of server-sent events while it is written.

A diffusion language model fills a block in any order, so what is sent as text are finished blocks, in order.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.concurrency import run_in_threadpool

from ..errors import ApiError, detail_of
from ..files import Files
from ..jobs import Job
from ..service import Service, unfinished
from .answers import Canvas, Choice, Chunk, usage_of
from .canvas import CANVAS
from .requests import StreamOptions

WAIT = 0.05  # seconds between two looks at a job
ALIVE = (
    10.0  # seconds after which a comment is sent, so that nobody between takes the line for dead
)


class Followed:
    """What the worker of a job has told so far, in any attempt.

    The same job gives the same text in each attempt, so what a new one tells again isn't sent again.

    Args:
        files: Where it lies.
        length: Tokens that are written.
    """

    def __init__(self, files: Files, length: int) -> None:
        self._files, self._length = files, length
        self._begin(0)
        self._sent = 0

    def _begin(self, attempt: int) -> None:
        self._attempt, self._offset, self._text = attempt, 0, ""
        self._tokens: list[str | None] = [None] * self._length

    def read(self, job: Job) -> list[tuple[str, Canvas]]:
        """What is new: text that wasn't sent yet, and the canvas after each step."""
        if job.attempt != self._attempt:
            self._begin(job.attempt)
        lines, end, _ = (self._files.read(job, CANVAS, self._offset) or b"").rpartition(b"\n")
        self._offset += len(lines) + len(end)
        return [self._told(json.loads(line)) for line in lines.splitlines()]

    def rest(self, text: str) -> str:
        """What wasn't sent of the whole text."""
        rest, self._sent = text[self._sent :], max(self._sent, len(text))
        return rest

    def _told(self, line: dict[str, Any]) -> tuple[str, Canvas]:
        start, tokens = line["start"], line["tokens"]
        self._tokens[start : start + len(tokens)] = tokens
        self._text += line["text"]
        return self.rest(self._text), Canvas(step=line["step"], tokens=[*self._tokens])


async def events(
    service: Service,
    job: Job,
    options: StreamOptions,
    gone: Callable[[], Awaitable[bool]],
    stays: bool,
) -> AsyncIterator[str]:
    """The events of a job until it has ended, then `[DONE]`.

    Args:
        service: What runs it.
        job: A job that writes.
        options: What comes beside the text.
        gone: Whether the client went away.
        stays: Whether the job goes on without its client; otherwise it is cancelled.
    """
    followed, last = Followed(service.files, job.text.max_tokens), time.monotonic()
    head: dict[str, Any] = {"id": job.id, "created": int(job.created_at), "model": job.model}
    ended = False
    try:
        while not ended:
            job = await run_in_threadpool(service.job, job.id, "text")
            ended = job.ended  # all that it told was written before
            for text, canvas in await run_in_threadpool(followed.read, job):
                if text or options.include_canvas:
                    shown = canvas if options.include_canvas else None
                    yield _event(Chunk(**head, choices=[_choice(text)], canvas=shown))
                    last = time.monotonic()
            if ended:
                break
            if await gone():
                return
            if time.monotonic() - last > ALIVE:
                yield f": {job.status}\n\n"
                last = time.monotonic()
            await asyncio.sleep(WAIT)
        if job.status != "completed":
            raise unfinished(job)
    except ApiError as error:  # too late for a status
        ended = True
        yield f"data: {json.dumps({'error': detail_of(error).model_dump()})}\n\n"
        return
    finally:
        if not ended and not stays:
            service.store.cancel(job.id)  # here nothing can be waited for any more
    result = job.result or {}
    rest = _choice(followed.rest(result["text"]), result["finish_reason"])
    yield _event(Chunk(**head, choices=[rest]))
    if options.include_usage:
        yield _event(Chunk(**head, choices=[], usage=usage_of(job)))
    yield "data: [DONE]\n\n"


def _choice(text: str, finish: Any = None) -> Choice:
    return Choice(text=text, finish_reason=finish)


def _event(chunk: Chunk) -> str:
    given = chunk.model_dump(exclude_none=True)
    for choice in given["choices"]:
        choice.setdefault("finish_reason", None)
    return f"data: {json.dumps(given)}\n\n"
