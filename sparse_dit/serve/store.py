"""The queue of jobs in a database: what the API asks of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import sqlalchemy as sa

from .jobs import ENDED, SELECT, Job, Spec, job_of, new_id
from .tables import JOBS, STORE, WORKERS, open_database


class QueueFull(Exception):
    """As many jobs are waiting as may.

    Args:
        waiting: How many.
    """

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} jobs are waiting already, which is as many as may")
        self.waiting = waiting


class OtherRequest(Exception):
    """An idempotency key was given again with another request."""


class Store:
    """Jobs and workers, shared by all processes that open the same database.

    Every change is one transaction that says what it expects, so that of two processes that want the same
    job one gets it, and no job ends twice.

    Args:
        url: The database, as SQLAlchemy has it.
        durable: See `open_database`.
        now: The clock, in seconds since 1970.
    """

    def __init__(
        self, url: str, *, durable: bool = True, now: Callable[[], float] = time.time
    ) -> None:
        self.url, self.now = url, now
        self._engine = open_database(url, durable=durable)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    def writing(self) -> Any:
        """A transaction that may write."""
        return self._engine.begin()

    def reading(self) -> Any:
        """A connection for a transaction that only reads."""
        return self._engine.connect().execution_options(reads=True)

    def submit(
        self,
        spec: Spec,
        model: str,
        *,
        limit: int,
        ttl: float | None = None,
        key: str | None = None,
        fingerprint: str = "",
        id: str | None = None,
    ) -> tuple[Job, bool]:
        """Add a job at the end of the queue.

        Args:
            spec: What it generates.
            model: Name of the model that it is for.
            limit: Jobs that may wait.
            ttl: Seconds from now until it and its files are deleted.
            key: Idempotency key: the job that came with the same key is returned in its place.
            fingerprint: Hash of the request, to tell whether the same key came with the same request.
            id: Its id, if the caller has made one.

        Returns:
            The job, and whether it is new.

        Raises:
            QueueFull: See there.
            OtherRequest: The key came with another request before.
        """
        now = self.now()
        values = {
            "id": id or new_id(spec.kind),
            "kind": spec.kind,
            "model": model,
            "plan": spec.plan,
            "spec": spec.model_dump_json(),
            "status": "queued",
            "created_at": now,
            "expires_at": None if ttl is None else now + ttl,
            "idempotency_key": key,
            "fingerprint": fingerprint,
        }
        with self.writing() as connection:
            connection.execute(sa.select(STORE.c.id).with_for_update())
            if key is not None:
                known = connection.execute(
                    SELECT.add_columns(JOBS.c.fingerprint).where(JOBS.c.idempotency_key == key)
                ).first()
                if known is not None:
                    return _same(known, fingerprint), False
            waiting = connection.execute(_count("queued")).scalar_one()
            if waiting >= limit:
                raise QueueFull(waiting)
            connection.execute(sa.insert(JOBS).values(**values))
            row = connection.execute(SELECT.where(JOBS.c.id == values["id"])).one()
        return job_of(row), True

    def get(self, id: str, kind: str | None = None) -> Job | None:
        """The job of an id; None if there is none, or it is of another kind."""
        if "\0" in id:  # which Postgres doesn't take
            return None
        wanted = SELECT.where(JOBS.c.id == id)
        if kind is not None:
            wanted = wanted.where(JOBS.c.kind == kind)
        with self.reading() as connection:
            row = connection.execute(wanted).first()
        return None if row is None else job_of(row)

    def list(
        self, kind: str, *, after: str | None, limit: int, order: Literal["asc", "desc"]
    ) -> tuple[list[Job], bool] | None:
        """Jobs of a kind by when they came, and whether there are more; None if `after` isn't known."""
        if after is not None and "\0" in after:
            return None
        wanted = SELECT.where(JOBS.c.kind == kind)
        with self.reading() as connection:
            if after is not None:
                place = sa.select(JOBS.c.seq).where(JOBS.c.id == after, JOBS.c.kind == kind)
                seq = connection.execute(place).scalar()
                if seq is None:
                    return None
                wanted = wanted.where(JOBS.c.seq > seq if order == "asc" else JOBS.c.seq < seq)
            by = JOBS.c.seq.asc() if order == "asc" else JOBS.c.seq.desc()
            rows = connection.execute(wanted.order_by(by).limit(limit + 1)).all()
        return [job_of(row) for row in rows[:limit]], len(rows) > limit

    def cancel(self, id: str) -> Job | None:
        """End a job: at once if it waits, before its next step if it runs, not at all if it has ended."""
        now = self.now()
        with self.writing() as connection:
            connection.execute(
                sa.update(JOBS)
                .where(JOBS.c.id == id, JOBS.c.status == "queued")
                .values(status="cancelled", cancel=True, completed_at=now)
            )
            connection.execute(
                sa.update(JOBS)
                .where(JOBS.c.id == id, JOBS.c.status == "in_progress")
                .values(cancel=True)
            )
            row = connection.execute(SELECT.where(JOBS.c.id == id)).first()
        return None if row is None else job_of(row)

    def delete(self, id: str) -> bool:
        """Remove a job; one that runs ends before its next step. False if there was none."""
        with self.writing() as connection:
            return connection.execute(sa.delete(JOBS).where(JOBS.c.id == id)).rowcount > 0

    def counts(self, model: str | None = None) -> dict[str, int]:
        """How many jobs there are, by status, for one model if it is named."""
        wanted = sa.select(JOBS.c.status, sa.func.count()).group_by(JOBS.c.status)
        if model is not None:
            wanted = wanted.where(JOBS.c.model == model)
        with self.reading() as connection:
            rows = connection.execute(wanted).all()
        return {**dict.fromkeys(("queued", "in_progress", *ENDED), 0), **dict(map(tuple, rows))}

    def totals(self) -> dict[str, float]:
        """Seconds that jobs waited and ran, and bytes of their files."""
        waited = sa.func.sum(JOBS.c.started_at - JOBS.c.created_at)
        done = JOBS.c.status == "completed"
        run = sa.func.sum(sa.case((done, JOBS.c.completed_at - JOBS.c.started_at), else_=0.0))
        with self.reading() as connection:
            found = connection.execute(sa.select(waited, run, sa.func.sum(JOBS.c.bytes))).one()
        names = ("waited_seconds", "run_seconds", "bytes")
        return {name: float(value or 0) for name, value in zip(names, found, strict=True)}

    def expired(self) -> list[str]:
        """Ids of jobs that have ended and whose time is over."""
        wanted = sa.select(JOBS.c.id).where(
            JOBS.c.status.in_(ENDED), JOBS.c.expires_at <= self.now()
        )
        with self.reading() as connection:
            return list(connection.execute(wanted).scalars())

    def oldest(self, limit: int) -> list[str]:
        """Ids of the jobs that ended first whose files take more than `limit` bytes with those after them."""
        wanted = (
            sa.select(JOBS.c.id, JOBS.c.bytes)
            .where(JOBS.c.status.in_(ENDED))
            .order_by(JOBS.c.completed_at.desc())
        )
        total, found = 0, []
        with self.reading() as connection:
            for id, size in connection.execute(wanted):
                total += size
                if total > limit:
                    found.append(id)
        return found

    def known(self) -> set[str]:
        """The ids of all jobs."""
        with self.reading() as connection:
            return set(connection.execute(sa.select(JOBS.c.id)).scalars())

    def workers(self) -> list[dict[str, Any]]:
        """Every worker that has said that it is there, and hasn't been found gone."""
        with self.reading() as connection:
            rows = connection.execute(sa.select(WORKERS).order_by(WORKERS.c.device)).all()
        return [dict(row._mapping) for row in rows]


def _count(status: str) -> Any:
    return sa.select(sa.func.count()).select_from(JOBS).where(JOBS.c.status == status)


def _same(known: Any, fingerprint: str) -> Job:
    if known.fingerprint != fingerprint:
        raise OtherRequest
    return job_of(known)
