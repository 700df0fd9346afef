"""One job, from its claim to its end."""

from __future__ import annotations

import functools
import gc
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..eval.metrics import SSIM_SIDE, psnr, ssim
from ..plan import Plan
from .claims import Claims
from .engine import Generated, read_image
from .files import Files
from .jobs import Job
from .media import preview_name, preview_of, preview_steps
from .plans import DENSE, Plans
from .progress import Progress, Times
from .spec import JobSpec, TextSpec
from .text.canvas import write_text
from .text.engine import TextEngine

logger = logging.getLogger("sparse_dit.serve")
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class Generator(Protocol):
    """What runs jobs: an `Engine`, or a stand-in."""

    @property
    def plans(self) -> Plans: ...

    def generate(
        self,
        spec: JobSpec,
        plan: Plan | None,
        after_step: Callable[[Tensor], bool | None],
        image: Any = None,
    ) -> Generated | None: ...

    def write(
        self, folder: Path, spec: JobSpec, video: np.ndarray, dense: np.ndarray | None
    ) -> None: ...


class _Ended(Exception):
    """The job isn't this worker's any more, or the worker is to stop."""


@dataclass
class Runner:
    """Runs jobs, one after another.

    Args:
        engine: What generates, or what writes.
        claims: The queue.
        files: Where results go.
        most_pixels: Most pixels of an uploaded image.
        stopping: Whether the worker is to stop; the job then goes back to its place in the queue.
    """

    engine: Generator | TextEngine
    claims: Claims
    files: Files
    most_pixels: int
    stopping: Callable[[], bool] = lambda: False
    times: Times = field(default_factory=Times)

    def run(self, job: Job) -> None:
        """Run a job to its end, whatever that is. Nothing is raised for what is wrong with a job."""
        try:
            texts = isinstance(job.spec, TextSpec)
            self._say(job, 0, {} if texts else Progress(job.picture, self.times).detail("starting"))
            with self.files.attempt(job):
                result = self._written(job) if texts else self._generated(job)
                size = self.files.publish(job, result)
                if not self.claims.complete(job, result, size):
                    raise _Ended
        except _Ended:
            self._ended(job)
        except Exception as error:
            code, message = explained(error)
            if code == "internal_error":
                logger.exception("job %s failed", job.id)
            else:
                logger.warning("job %s failed: %s", job.id, code)
            self.claims.fail(job, code, message)
            error.__traceback__ = None  # which holds the tensors
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def _written(self, job: Job) -> dict[str, Any]:
        """Write a text; what the API says of it."""
        engine: Any = self.engine
        plan = engine.plans.named(job.text.plan, None)
        folder = self.files.making(job)
        return write_text(engine, job.text, plan, folder, functools.partial(self._say, job))

    def _generated(self, job: Job) -> dict[str, Any]:
        """Generate a video or an image; what the API says of it."""
        spec, engine = job.picture, self._generator
        plan = engine.plans.named(spec.plan, spec.speedup)
        progress = Progress(spec, self.times, self._forecast(spec))
        image = None
        if spec.has_input:
            image = read_image(self.files.uploaded(job.id), self.most_pixels)
        phase = DENSE if plan is None else "sparse"
        self._advance(job, progress, phase)
        sparse = self._generate(job, progress, phase, plan, image)
        dense = None
        if spec.compare and plan is not None:
            dense = self._generate(job, progress, DENSE, None, image)
        self._advance(job, progress, "writing")
        result = _result(spec, sparse, dense)
        folder = self.files.making(job)
        engine.write(folder, spec, sparse.video, dense.video if dense else None)
        result["seconds"] = round(progress.finished(), 4)
        result["previews"] = progress.previews
        return result

    @property
    def _generator(self) -> Generator:
        engine: Any = self.engine
        return engine

    def _generate(
        self, job: Job, progress: Progress, phase: str, plan: Plan | None, image: Any
    ) -> Generated:
        shown = {progress.step + step for step in preview_steps(job.picture.steps)}

        def after_step(latents: Tensor) -> bool:
            progress.stepped()
            if progress.step in shown:
                self._preview(job, progress, latents)
            self._advance(job, progress, phase)
            return False

        made = self._generator.generate(job.picture, plan, after_step, image)
        if made is None:
            raise _Ended
        return made

    def _preview(self, job: Job, progress: Progress, latents: Tensor) -> None:
        picture = preview_of(latents)
        if picture is not None:
            picture.save(self.files.making(job) / preview_name(progress.step))
            progress.previews.append(progress.step)

    def _advance(self, job: Job, progress: Progress, phase: str) -> None:
        self._say(job, progress.percent, progress.detail(phase))

    def _say(self, job: Job, percent: int, detail: dict[str, Any]) -> None:
        if self.stopping() or not self.claims.advance(job, percent, detail):
            raise _Ended

    def _ended(self, job: Job) -> None:
        """A job that ended early: cancelled, deleted, or to be run by the next worker."""
        if self.claims.stopped(job) or not self.stopping():
            logger.info("job %s was ended", job.id)
        else:
            self.claims.give_back(job)
        if self.claims.store.get(job.id) is None:
            self.files.remove(job.id)

    def _forecast(self, spec: JobSpec) -> list[float]:
        """The seconds that the plan expects of each generation; empty if it doesn't know one of them."""
        served = self._generator.plans.get(spec.plan)
        expected = served.forecast(spec) if served is not None else {}
        names = ("seconds", "dense_seconds") if spec.compare else ("seconds",)
        return [expected[name] for name in names] if expected.keys() >= {*names} else []


def explained(error: Exception) -> tuple[str, str]:
    """The code and the message of a job's error."""
    text = " ".join(str(error).split())
    out = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if out or any(words in text for words in OUT_OF_MEMORY):
        return "out_of_memory", (
            "the device has not enough memory for this: ask for a smaller size or fewer frames or tokens"
        )
    if isinstance(error, ValueError):
        return "invalid_request", text
    return "internal_error", f"{type(error).__name__}: {text:.500}"


def _result(spec: JobSpec, made: Generated, dense: Generated | None) -> dict[str, Any]:
    """What the API says of a finished job, JSON-ready."""
    result: dict[str, Any] = {
        "inference_seconds": round(made.taken.wall, 4),
        "summary": made.summary,
        "density": made.summary["density"] if made.summary else None,
    }
    if dense is not None:
        result["dense_seconds"] = round(dense.taken.wall, 4)
        result["psnr_db"] = _finite(psnr(made.video, dense.video))
        if min(made.video.shape[1:3]) >= SSIM_SIDE:
            result["ssim"] = _finite(ssim(made.video, dense.video))
    return result


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity; equal videos count as 100 dB."""
    if math.isnan(value):
        return None
    return round(min(value, 100.0), 4)
