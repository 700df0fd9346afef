"""The queue of jobs in a database: what workers ask of it, and what becomes of a lost worker's jobs."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import sqlalchemy as sa

from .files import Files
from .jobs import SELECT, Job, job_of
from .store import Store
from .tables import JOBS, WORKERS

BEAT = 1.0  # seconds between two signs of life
LEASE = 30.0  # seconds without one after which a worker counts as gone
STARTING = 300.0  # the same for a process that hasn't said anything yet, as it still imports
CRASHES = 2  # of workers that a job may take part in
ATTEMPTS = 10  # in all; others than crashes are the server's end, which is no fault of the job
READY = ("idle", "busy")  # states of a worker that has loaded
Policy = Literal["restart", "fail"]


@dataclass(frozen=True)
class Worker:
    """What tells workers apart.

    Args:
        id: New for each process.
        model: Name of the model that it holds.
        device: Where it computes.
        plans: Names of the plans that it can run.
    """

    id: str
    model: str
    device: str
    plans: Collection[str]


class Claims:
    """The jobs that workers run, in a store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def register(self, worker: Worker, pid: int, state: str) -> None:
        """Say that there is a worker, which runs as a process of this machine."""
        process = psutil.Process(pid)
        row = {
            "id": worker.id,
            "model": worker.model,
            "device": worker.device,
            "host": socket.gethostname(),
            "pid": pid,
            "started": process.create_time(),
            "beat": self.store.now(),
            "state": state,
        }
        with self.store.writing() as connection:
            connection.execute(sa.delete(WORKERS).where(WORKERS.c.id == worker.id))
            connection.execute(sa.insert(WORKERS).values(**row))

    def beat(self, worker: Worker, state: str) -> None:
        """Say that the worker that calls is still there, and what it does."""
        values = {"beat": self.store.now(), "state": state}
        known = sa.update(WORKERS).where(WORKERS.c.id == worker.id).values(**values)
        if not self._changed(known):  # it was taken for gone, as after the machine slept
            self.register(worker, os.getpid(), state)

    def claim(self, worker: Worker) -> Job | None:
        """The first job in the queue that the worker can run, which is its own from then on."""
        wanted = sa.select(JOBS.c.id).where(
            JOBS.c.status == "queued", JOBS.c.model == worker.model, JOBS.c.plan.in_(worker.plans)
        )
        first = wanted.order_by(JOBS.c.seq).limit(1)
        with self.store.reading() as connection:  # most often there is none, and nobody waits
            if connection.execute(first).first() is None:
                return None
        with self.store.writing() as connection:
            id = connection.execute(first.with_for_update(skip_locked=True)).scalar()
            if id is None:
                return None
            now = self.store.now()
            connection.execute(
                sa.update(JOBS)
                .where(JOBS.c.id == id, JOBS.c.status == "queued")
                .values(
                    status="in_progress",
                    worker=worker.id,
                    attempt=JOBS.c.attempt + 1,
                    started_at=now,
                    progress=0,
                    detail={},
                )
            )
            return job_of(connection.execute(SELECT.where(JOBS.c.id == id)).one())

    def advance(self, job: Job, progress: int, detail: dict[str, Any]) -> bool:
        """Say where a job stands; False if it was cancelled, deleted or given to another worker."""
        wanted = _own(job).where(JOBS.c.cancel.is_(False))
        return self._changed(wanted.values(progress=progress, detail=detail))

    def complete(self, job: Job, result: dict[str, Any], size: int) -> bool:
        """Say that a job is done, its files being in place; False as in `advance`."""
        values = {"status": "completed", "progress": 100, "result": result, "bytes": size}
        wanted = _own(job).where(JOBS.c.cancel.is_(False))
        done = {**values, "error": None, "completed_at": self.store.now()}
        return self._changed(wanted.values(**done))

    def fail(self, job: Job, code: str, message: str) -> bool:
        """Say that a job can't be done; False if it isn't the worker's any more."""
        error = {"code": code, "message": message}
        return self._changed(
            _own(job).values(status="failed", error=error, completed_at=self.store.now())
        )

    def stopped(self, job: Job) -> bool:
        """Say that a job that was cancelled has ended."""
        return self._changed(
            _own(job)
            .where(JOBS.c.cancel.is_(True))
            .values(status="cancelled", completed_at=self.store.now())
        )

    def give_back(self, job: Job) -> bool:
        """Put a job that was begun back where it stood in the queue."""
        return self._changed(_own(job).values(status="queued", worker=None, progress=0, detail={}))

    def gone(self, id: str) -> None:
        """Say that a worker has ended."""
        with self.store.writing() as connection:
            connection.execute(sa.delete(WORKERS).where(WORKERS.c.id == id))

    def crashed(self, id: str, message: str) -> None:
        """Say that a worker ended while it may have run a job, which keeps why.

        The job is queued again, and fails if it was there when a worker ended before.
        """
        error = {"code": "worker_crashed", "message": message}
        mine = (JOBS.c.worker == id, JOBS.c.status == "in_progress", JOBS.c.cancel.is_(False))
        again = {"status": "queued", "worker": None, "progress": 0, "detail": {}, "error": error}
        failed = {"status": "failed", "error": error, "completed_at": self.store.now()}
        with self.store.writing() as connection:
            connection.execute(sa.delete(WORKERS).where(WORKERS.c.id == id))
            more = sa.update(JOBS).where(*mine).values(crashes=JOBS.c.crashes + 1)
            connection.execute(more)
            few = JOBS.c.crashes < CRASHES
            connection.execute(sa.update(JOBS).where(*mine, few).values(**again))
            connection.execute(sa.update(JOBS).where(*mine, ~few).values(**failed))

    def recover(self, files: Files, policy: Policy) -> list[str]:
        """Take the jobs of workers that are gone from them; their ids are returned.

        What is complete on disk is done, what was cancelled is cancelled, the rest is queued again in its
        old place or fails, as the policy says.
        """
        with self.store.reading() as connection:
            rows = connection.execute(SELECT.where(JOBS.c.status == "in_progress")).all()
        if not rows and not self.store.workers():
            return []
        alive = {row["id"] for row in self.store.workers() if self._alive(row)}
        found = []
        for job in map(job_of, rows):
            if job.worker in alive:
                continue
            found.append(job.id)
            self._take(job, files, policy)
        self._forget(alive)
        return found

    def _take(self, job: Job, files: Files, policy: Policy) -> None:
        done = files.result(job)
        if job.cancel:
            self.stopped(job)
        elif done is not None:
            self.complete(job, done, files.size(job))
        elif policy == "fail":
            self.fail(job, "interrupted", "the server ended while the job ran")
        elif job.attempt >= ATTEMPTS:
            self.fail(job, "interrupted", f"the server ended {job.attempt} times while the job ran")
        else:
            self.give_back(job)

    def _alive(self, row: dict[str, Any]) -> bool:
        if overdue(row, self.store.now()):
            return False
        if row["host"] != socket.gethostname():
            return True
        try:
            return abs(psutil.Process(row["pid"]).create_time() - row["started"]) < 1
        except psutil.Error:
            return False

    def _forget(self, alive: set[str]) -> None:
        """Remove the rows of workers that are gone."""
        gone = [row["id"] for row in self.store.workers() if not self._alive(row)]
        with self.store.writing() as connection:
            for id in set(gone) - alive:
                connection.execute(sa.delete(WORKERS).where(WORKERS.c.id == id))

    def _changed(self, statement: Any) -> bool:
        with self.store.writing() as connection:
            return connection.execute(statement).rowcount == 1


def overdue(row: dict[str, Any], now: float) -> bool:
    """Whether a worker gave no sign of life for too long."""
    return now - row["beat"] > (STARTING if row["state"] == "starting" else LEASE)


def _own(job: Job) -> Any:
    """An update of a job as long as it is this worker's, in this attempt."""
    return sa.update(JOBS).where(
        JOBS.c.id == job.id,
        JOBS.c.worker == job.worker,
        JOBS.c.attempt == job.attempt,
        JOBS.c.status == "in_progress",
    )
