"""A server without a model: its pipeline takes milliseconds, and does what the prompt says."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
import torch
from torch import Tensor

from sparse_dit.generation import GenerationSettings
from sparse_dit.plan import Plan
from sparse_dit.serve.card import Card
from sparse_dit.serve.claims import Claims, Worker
from sparse_dit.serve.engine import Generated
from sparse_dit.serve.files import Files
from sparse_dit.serve.jobs import Job
from sparse_dit.serve.media import VARIANTS, write_media
from sparse_dit.serve.options import ServeOptions
from sparse_dit.serve.plans import Plans
from sparse_dit.serve.running import Runner
from sparse_dit.serve.service import Service
from sparse_dit.serve.spec import JobSpec
from sparse_dit.serve.store import Store
from sparse_dit.serve.tables import database_url
from sparse_dit.serve.worker import WorkerOptions
from sparse_dit.timing import Taken

MODEL = "stub"
# of a database that tests may fill; all tests of the server then run on it: `postgresql+psycopg://...`
POSTGRES = os.environ.get("SPARSE_DIT_TEST_POSTGRES")
SPEC = JobSpec(
    kind="video", prompt="a cat", seed=0, width=32, height=16, num_frames=2, steps=3,
    guidance=1.0, plan="dense",
)  # fmt: skip


@dataclass(frozen=True)
class StubEngine:
    """Calls back after each step, as a pipeline does.

    Prompts: `crash` ends the process, `memory` and `broken` raise, `wrong` asks for what can't be.

    Args:
        step_seconds: How long a step takes.
        plans: What may be named.
        ends: A file that gets a line with the seed of each generation that came to its end.
        encode: Whether videos are written as such, which takes longer than all else.
    """

    step_seconds: float = 0.0
    plans: Plans = field(default_factory=lambda: Plans([]))
    ends: Path | None = None
    encode: bool = False

    def generate(
        self,
        spec: JobSpec,
        plan: Plan | None,
        after_step: Callable[[Tensor], bool | None],
        image: Any = None,
    ) -> Generated | None:
        _obey(spec.prompt)
        noise = torch.Generator().manual_seed(spec.seed)
        latents = torch.randn(1, 4, spec.num_frames, 4, 8, generator=noise)
        for _ in range(spec.steps):
            time.sleep(self.step_seconds)
            if after_step(latents):
                return None
        video = np.random.default_rng(spec.seed).random(
            (spec.num_frames, spec.height, spec.width, 3), np.float32
        )
        if plan is not None:  # a little other than dense
            video = np.clip(video + 0.01, 0, 1)
        if self.ends is not None:
            with self.ends.open("a") as file:
                file.write(f"{spec.seed}\n")
        seconds = spec.steps * self.step_seconds
        summary = None if plan is None else {"density": plan.density}
        return Generated(video, Taken(seconds, seconds), summary)

    def write(self, folder: Path, spec: JobSpec, video: Any, dense: Any) -> None:
        if self.encode:
            write_media(folder, spec, video, dense)
            return
        for name, _ in VARIANTS.values():
            (folder / name).write_bytes(video.tobytes()[:64])


def _obey(prompt: str) -> None:
    if prompt.startswith("crash"):
        os.kill(os.getpid(), signal.SIGKILL)
    if prompt.startswith("memory"):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 EiB")
    if prompt.startswith("broken"):
        raise KeyError("a stub that is broken")
    if prompt.startswith("wrong"):
        raise ValueError("the stub can't do this")


@dataclass(frozen=True)
class LoadStub:
    """Makes the engine in a worker's process."""

    step_seconds: float = 0.0
    ends: Path | None = None
    encode: bool = False

    def __call__(self, device: str) -> StubEngine:
        return StubEngine(self.step_seconds, ends=self.ends, encode=self.encode)


def check_stub(spec: JobSpec) -> None:
    """What the stub can make."""
    if spec.width % 16 or spec.height % 16:
        raise ValueError("height and width must each be a multiple of 16")


def stub_card(kind: Any = "video", plans: Plans | None = None, image: Any = "no") -> Card:
    """What the stub makes."""
    frames = 2 if kind == "video" else 1
    settings = GenerationSettings(16, 32, frames, steps=3, guidance=1.0)
    return Card(MODEL, kind, settings, 8, plans or Plans([]), image, check_stub)


def store_url(folder: Path) -> str:
    """The database of a folder: SQLite in it, or a schema of its own where a Postgres is named."""
    if POSTGRES is None:
        return database_url(str(folder))
    schema = f"folder_{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
    engine = sa.create_engine(POSTGRES)
    with engine.begin() as connection:
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(1)))
        connection.execute(sa.schema.CreateSchema(schema, if_not_exists=True))
    engine.dispose()
    url = sa.make_url(POSTGRES).update_query_dict({"options": f"-csearch_path={schema}"})
    return url.render_as_string(hide_password=False)


def stub_service(folder: Path, card: Card | None = None, **options: Any) -> Service:
    """A server without HTTP, in a folder."""
    files = folder / "files"
    folder.mkdir(parents=True, exist_ok=True)
    made = ServeOptions(store=store_url(folder), files=str(files), **options)
    return Service(Store(made.store), Files(files), card or stub_card(), made)


def stub_workers(service: Service, load: LoadStub, count: int = 1) -> list[WorkerOptions]:
    """What the worker processes of a server are started with."""
    options = service.options
    one = WorkerOptions(load, "cpu", MODEL, options.store, options.files, 1 << 20)
    return [replace(one, device=f"cpu:{n}") for n in range(count)]


def runner_of(service: Service, engine: Any = None, **options: Any) -> Runner:
    """A worker in this process."""
    engine = engine or StubEngine(plans=service.card.plans)
    return Runner(engine, Claims(service.store), service.files, 1 << 20, **options)


def claimed(service: Service, id: str = "worker") -> Job | None:
    """The next job, for a worker of this name."""
    worker = Worker(id, MODEL, "cpu", service.card.plans.names)
    return Claims(service.store).claim(worker)


def work(service: Service, engine: Any = None) -> list[str]:
    """Run all that waits; the ids in order."""
    runner, done = runner_of(service, engine), []
    while job := claimed(service):
        runner.run(job)
        done.append(job.id)
    return done


@contextmanager
def working(service: Service, engine: Any = None, alive: bool = False) -> Iterator[None]:
    """A worker in a thread beside the block; with `alive` it gives signs of life, as a process does."""
    stop, claims = threading.Event(), Claims(service.store)

    def run() -> None:
        while not stop.is_set():
            if alive:
                claims.beat(Worker("worker", MODEL, "cpu", ()), "idle")
            work(service, engine)
            stop.wait(0.02)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
