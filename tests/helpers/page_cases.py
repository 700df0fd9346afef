"""A server with a page, in this process: a plan with a front, videos in which something moves."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from torch import Tensor

from sparse_dit.account import Ran
from sparse_dit.generation import GenerationSettings
from sparse_dit.plan import Plan
from sparse_dit.search.front import Front, Point
from sparse_dit.serve.app import create_app
from sparse_dit.serve.card import Card
from sparse_dit.serve.claims import Claims, Worker
from sparse_dit.serve.engine import Generated
from sparse_dit.serve.jobs import Job
from sparse_dit.serve.plans import Plans, Served
from sparse_dit.serve.service import Service
from sparse_dit.serve.spec import JobSpec
from sparse_dit.summary import summarise
from tests.helpers.plan_cases import DENSE, HASH, NEAR, small
from tests.helpers.serve_cases import (
    MODEL,
    StubEngine,
    check_stub,
    claimed,
    runner_of,
    stub_service,
)

SETTINGS = GenerationSettings(64, 96, 8, steps=6, guidance=1.0)
WORKER = Worker("page", MODEL, "cpu", ())
FORECASTS = (  # speed-up, density, PSNR, patterns of the four heads
    (1.0, 1.0, 100.0, [0, 0, 0, 0]),
    (1.3, 0.7, 40.0, [0, 0, 1, 0]),
    (1.8, 0.5, 35.0, [0, 1, 1, 0]),
    (2.5, 0.3, 28.0, [1, 1, 1, 0]),
)


def page_plans() -> Plans:
    """A plan whose front has four points, of which it is the third, and one without a front."""
    points = [
        Point(
            speedup=speedup,
            density=density,
            error=1 / psnr,
            seconds=10 / speedup,
            psnr=psnr,
            patterns=patterns,
            errors=[0.1] * 4,
        )
        for speedup, density, psnr, patterns in FORECASTS
    ]
    plan = small(
        forecast={"speedup": 1.8, "seconds": 5.6},
        measured={"psnr_db": 35.5},
        provenance={"settings": SETTINGS.to_dict(), "device": "cpu"},
    )
    front = Front(HASH, 10.0, (DENSE, NEAR), tuple(points))
    return Plans([Served("front", plan, front), Served("single", small(density=0.4), None)])


def page_card(plans: Plans | None = None) -> Card:
    """What the stub makes."""
    return Card(MODEL, "video", SETTINGS, 8, plans or page_plans(), "no", check_stub)


@dataclass(frozen=True)
class PageEngine(StubEngine):
    """Makes videos that a person can tell apart, and says what ran.

    Args:
        before_step: Called before the end of each step.
    """

    before_step: Callable[[], None] = lambda: None

    def generate(
        self,
        spec: JobSpec,
        plan: Plan | None,
        after_step: Callable[[Tensor], bool | None],
        image: Any = None,
    ) -> Generated | None:
        def stepped(latents: Tensor) -> bool | None:
            self.before_step()
            return after_step(latents)

        made = super().generate(spec, plan, stepped, image)
        if made is None:
            return None
        summary = None
        if plan is not None:
            ran = [
                Ran("blocks.0.attn1", 0, "a stage that is dense", None, 4, 100, 100, 100),
                Ran("blocks.0.attn1", 1, None, "cpu", 8, 1200 * plan.density - 100, 1100, 100),
            ]
            summary = asdict(summarise(plan, {"transformer": tuple(ran)}, {}))
        return replace(made, video=_film(spec, plan is not None), summary=summary)


def _film(spec: JobSpec, sparse: bool) -> np.ndarray:
    """A square that moves over stripes, a little paler if sparse."""
    video = np.zeros((spec.num_frames, spec.height, spec.width, 3), np.float32)
    video[..., 2] = 0.3 + 0.3 * (np.arange(spec.width) // 8 % 2)
    side = spec.height // 3
    for number, frame in enumerate(video):
        left = number * (spec.width - side) // max(1, spec.num_frames - 1)
        frame[side : 2 * side, left : left + side] = (0.9, 0.3, 0.2)
    return video * 0.97 + 0.02 if sparse else video


class Site:
    """A server on a port of its own, with a worker in a thread; it can be stopped and started again.

    Args:
        folder: Of the store, which outlives a stop.

    Attributes:
        state: What the worker says of itself.
        held_at: The step at which a job waits until this is another one; None lets all run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.state = "idle"
        self.held_at: int | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.start()

    @property
    def service(self) -> Service:
        """What is served."""
        return self._service

    def start(self) -> None:
        """Start it; returns when it answers."""
        self._service = stub_service(self._folder, page_card())
        self._stop = threading.Event()
        config = uvicorn.Config(
            create_app(self._service), host="127.0.0.1", port=self._port, log_level="error"
        )
        self._server = uvicorn.Server(config)
        self._threads = [
            threading.Thread(target=part) for part in (self._server.run, self._work, self._beat)
        ]
        self.beat()
        for thread in self._threads:
            thread.start()
        until = time.monotonic() + 60
        while not self._server.started:
            assert time.monotonic() < until, "the server starts"
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop it; the job that runs goes back to its place in the queue."""
        self._stop.set()
        for thread in self._threads[1:]:
            thread.join()
        self._server.should_exit = True
        self._threads[0].join()

    def beat(self) -> None:
        """Say that the worker is there."""
        Claims(self._service.store).beat(WORKER, self.state)

    def wait_until_idle(self) -> None:
        """Wait until no job waits or runs."""
        until = time.monotonic() + 60
        while any(map(self._service.store.counts().get, ("queued", "in_progress"))):
            assert time.monotonic() < until, "jobs end"
            time.sleep(0.02)

    def _work(self) -> None:
        while not self._stop.is_set():
            job = claimed(self._service, WORKER.id)
            if job is None:
                self._stop.wait(0.02)
                continue
            plans, hold = self._service.card.plans, self._holding(job)
            engine = PageEngine(plans=plans, encode=True, before_step=hold)
            runner_of(self._service, engine, stopping=self._stop.is_set).run(job)

    def _holding(self, job: Job) -> Callable[[], None]:
        """What waits at the step of a job that it is to be held at, unless it is to end."""
        steps = itertools.count(1)

        def hold() -> None:
            step = next(steps)
            while step == self.held_at and not self._stop.wait(0.02):
                found = self._service.store.get(job.id)
                if found is None or found.cancel:
                    return

        return hold

    def _beat(self) -> None:
        while not self._stop.wait(1):
            self.beat()
