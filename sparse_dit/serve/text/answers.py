"""The bodies of answers at /v1/completions."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from ..answers import JobError
from ..jobs import Job, Status


class Choice(BaseModel):
    """What was written."""

    text: str
    index: int = 0
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None


class Usage(BaseModel):
    """How many tokens were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """A job that writes, in the shape of OpenAI's completions with what this server knows beside it.

    `choices` is empty until it is completed. `steps` are those that were run.
    """

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None
    # beyond that shape
    status: Status
    progress: int
    error: JobError | None
    prompt: str
    seed: int
    plan: str
    attempt: int
    queue_position: int | None
    steps: int | None
    density: float | None
    inference_time_s: float | None
    summary: dict[str, Any] | None


class CompletionDeleted(BaseModel):
    """A job that is gone."""

    id: str
    object: Literal["text_completion.deleted"] = "text_completion.deleted"
    deleted: bool = True


class Canvas(BaseModel):
    """All that is written after a step: the text of each token, null where none is written yet."""

    step: int
    tokens: list[str | None]


class Chunk(BaseModel):
    """A part of a stream: text that is finished, a step's canvas, the end, or the count of tokens."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None
    canvas: Canvas | None = None


def completion_of(job: Job, *, whole: bool = True) -> Completion:
    """What is said of a job.

    Args:
        job: The job.
        whole: Whether the summary of what ran is in it; lists leave it out.
    """
    spec, result = job.text, job.result or {}
    done = job.status == "completed"
    shown = job.error if job.status == "failed" else None
    return Completion(
        id=job.id,
        created=int(job.created_at),
        model=job.model,
        choices=[Choice(text=result["text"], finish_reason=result["finish_reason"])]
        if done
        else [],
        usage=usage_of(job) if done else None,
        status=job.status,
        progress=job.progress,
        error=None if shown is None else JobError(**shown),
        prompt=spec.prompt,
        seed=spec.seed,
        plan=spec.plan,
        attempt=job.attempt,
        queue_position=None if job.ahead is None else job.ahead + 1,
        steps=result.get("steps"),
        density=result.get("density"),
        inference_time_s=result.get("inference_seconds"),
        summary=result.get("summary") if whole else None,
    )


def usage_of(job: Job) -> Usage:
    """The tokens of a completed job."""
    read, written = job.text.prompt_tokens, (job.result or {})["completion_tokens"]
    return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)
