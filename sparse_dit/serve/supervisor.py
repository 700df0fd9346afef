"""Starts a worker for each device, and another one when it ends."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import secrets
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .claims import READY, Claims, Worker, overdue
from .troubles import Troubles
from .worker import WorkerOptions, run_worker

WATCH = 0.2  # seconds between two looks at the workers
GRACE = 10.0  # seconds that workers have to stop in
BACKOFF = (
    0.0,
    1.0,
    5.0,
    30.0,
)  # seconds before a worker that ended right after its start is started again
SETTLED = 60.0  # seconds after which an end isn't right after the start
STUCK = "gave no sign of life for too long, and was ended"
logger = logging.getLogger("sparse_dit.serve")


@dataclass
class _Slot:
    """The place of one worker."""

    options: WorkerOptions
    process: Any = None
    id: str = ""
    started: float = 0.0
    stuck: bool = False
    failures: int = 0
    start_at: float = 0.0


class Supervisor:
    """Keeps one worker process running for each of the options, from a thread of its own.

    Args:
        options: One for each worker.
        claims: The queue, whose jobs are taken from workers that ended.
    """

    def __init__(self, options: Sequence[WorkerOptions], claims: Claims) -> None:
        self._slots = [_Slot(one) for one in options]
        self._claims = claims
        self._troubles = Troubles(claims.store)
        self._context = multiprocessing.get_context("spawn")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def start(self) -> None:
        """Start the workers; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the workers: each gives its job back and ends, or is killed."""
        self._stop.set()
        self._thread.join()
        running = [slot for slot in self._slots if slot.process is not None]
        for slot in running:
            slot.process.terminate()
        until = time.monotonic() + GRACE
        for slot in running:
            slot.process.join(max(0.0, until - time.monotonic()))
            if slot.process.is_alive():
                slot.process.kill()
                slot.process.join()
            slot.process.close()

    @property
    def pids(self) -> list[int]:
        """The process numbers of the workers that run."""
        return [slot.process.pid for slot in self._slots if slot.process is not None]

    def _watch(self) -> None:
        while not self._stop.is_set():
            for slot in self._slots:
                try:
                    self._look_at(slot)
                except Exception:
                    logger.exception("a worker couldn't be looked after")
            self._stop.wait(WATCH)

    def _look_at(self, slot: _Slot) -> None:
        now = time.monotonic()
        if slot.process is None:
            if now >= slot.start_at:
                self._start(slot)
            return
        if slot.process.is_alive():
            self._end_if_stuck(slot)
            return
        why = STUCK if slot.stuck else ended_because(slot.process.exitcode)
        slot.process.close()
        slot.process = None
        logger.error("the worker on %s %s", slot.options.device, why)
        row = self._row(slot)
        if row is not None and row["state"] not in READY:
            self._troubles.note(_worker(slot), f"the worker {why} before it was ready")
        self._claims.crashed(slot.id, f"the worker {why}")
        slot.failures = 0 if now - slot.started > SETTLED else slot.failures + 1
        slot.start_at = now + BACKOFF[min(slot.failures, len(BACKOFF) - 1)]

    def _start(self, slot: _Slot) -> None:
        slot.id, slot.started, slot.stuck = secrets.token_hex(8), time.monotonic(), False
        slot.process = self._context.Process(
            target=run_worker, args=(slot.options, slot.id), daemon=True
        )
        slot.process.start()
        self._claims.register(_worker(slot), slot.process.pid, "starting")

    def _end_if_stuck(self, slot: _Slot) -> None:
        """Kill a worker that gave no sign of life for too long."""
        row = self._row(slot)
        if row is not None and overdue(row, self._claims.store.now()):
            slot.stuck = True
            slot.process.kill()
            slot.process.join()

    def _row(self, slot: _Slot) -> dict[str, Any] | None:
        """What the store knows of a worker; None after it said that it ends."""
        return next((r for r in self._claims.store.workers() if r["id"] == slot.id), None)


def _worker(slot: _Slot) -> Worker:
    return Worker(slot.id, slot.options.model, slot.options.device, ())


def ended_because(code: int) -> str:
    """The end of a process in words."""
    if code == -signal.SIGKILL:
        return "was killed (signal 9), as the system does when memory runs out"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-code).name}"
        return f"ended by signal {-code}"
    return f"ended with exit code {code}"
