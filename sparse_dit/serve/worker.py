"""A worker process: it loads the pipeline onto a device and runs the jobs of the queue."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from .claims import BEAT, Claims, Worker
from .files import Files
from .running import Generator, Runner
from .store import Store
from .text.engine import TextEngine
from .troubles import Troubles

NICENESS = 10
POLL = 0.02  # seconds between two looks at a queue that has just become empty
REST = 0.1  # the same after four seconds without a job; each look is a query
logger = logging.getLogger("sparse_dit.serve")


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker's process is started with; it can be pickled.

    Args:
        load: Called with the device; gives what runs the jobs.
        device: Where.
        model: Name of the model, as jobs have it.
        url: The store's database.
        folder: The store's files.
        most_pixels: Most pixels of an uploaded image.
    """

    load: Callable[[str], Generator | TextEngine]
    device: str
    model: str
    url: str
    folder: str
    most_pixels: int


def run_worker(options: WorkerOptions, id: str) -> None:
    """Load, and run jobs until told to stop: by SIGTERM, or by the end of the process that started it."""
    stop = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the server tells its workers
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    _end_with_parent()
    if options.device == "cpu" and hasattr(os, "nice"):
        os.nice(NICENESS)  # on the cores that it generates on, the server answers first
    store = Store(options.url, durable=False)
    claims = Claims(store)
    state = {"now": "loading"}
    worker = Worker(id, options.model, options.device, ())
    claims.beat(worker, state["now"])
    threading.Thread(target=_beat, args=(claims, worker, state), daemon=True).start()
    engine = _loaded(options, worker, Troubles(store))
    state["now"] = "idle"
    claims.beat(worker, state["now"])
    worker = replace(worker, plans=engine.plans.names)
    files = Files(Path(options.folder))
    _serve(worker, Runner(engine, claims, files, options.most_pixels, stop.is_set), state, stop)
    claims.gone(id)


def _loaded(options: WorkerOptions, worker: Worker, troubles: Troubles) -> Generator | TextEngine:
    """What runs the jobs; if it can't be loaded, the store has why."""
    try:
        engine = options.load(options.device)
    except Exception as error:
        text = " ".join(str(error).split())
        troubles.note(worker, f"the model can't be loaded: {type(error).__name__}: {text}")
        raise
    troubles.over(worker)
    return engine


def _serve(worker: Worker, runner: Runner, state: dict[str, str], stop: threading.Event) -> None:
    pause = POLL
    while not stop.is_set():
        job = runner.claims.claim(worker)
        if job is None:
            state["now"] = "idle"
            stop.wait(pause)
            pause = min(REST, 1.02 * pause)
            continue
        state["now"], pause = "busy", POLL
        began = time.perf_counter()
        runner.run(job)
        logger.info("job %s: %.2f s on %s", job.id, time.perf_counter() - began, worker.device)


def _beat(claims: Claims, worker: Worker, state: dict[str, str]) -> None:
    while True:
        time.sleep(BEAT)
        try:
            claims.beat(worker, state["now"])
        except Exception:  # the database is away for a moment
            logger.exception("no sign of life could be given")


def _end_with_parent() -> None:
    """End this process at once when the one that started it has: the device belongs to the next server."""
    parent: Any = parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
