"""Why workers ended before they were ready, kept until one is: for people who look at a server that waits."""

from __future__ import annotations

import socket
from typing import Any

import sqlalchemy as sa

from .claims import Worker
from .store import Store
from .tables import TROUBLES

RECENT = 600.0  # seconds for which one is told
MOST_TEXT = 1000  # characters


class Troubles:
    """The workers that ended while they started or loaded, in a store.

    Args:
        store: Where they are kept.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def note(self, worker: Worker, message: str) -> None:
        """Keep why a worker ended, in the place of what its device ended of before.

        What is known of this worker already stays: it knows better than who only saw it end.
        """
        with self._store.writing() as connection:
            known = sa.select(TROUBLES.c.worker).where(TROUBLES.c.worker == worker.id)
            if connection.execute(known).first() is not None:
                return
            connection.execute(sa.delete(TROUBLES).where(*_place(worker)))
            connection.execute(
                sa.insert(TROUBLES).values(
                    worker=worker.id,
                    host=socket.gethostname(),
                    model=worker.model,
                    device=worker.device,
                    at=self._store.now(),
                    message=message[:MOST_TEXT].replace("\0", " "),
                )
            )

    def over(self, worker: Worker) -> None:
        """Forget what a device had: a worker is ready there."""
        with self._store.reading() as connection:
            if (
                connection.execute(sa.select(TROUBLES.c.worker).where(*_place(worker))).first()
                is None
            ):
                return
        with self._store.writing() as connection:
            connection.execute(sa.delete(TROUBLES).where(*_place(worker)))

    def recent(self, model: str) -> list[dict[str, Any]]:
        """What keeps workers of a model from being ready, the latest first."""
        since = self._store.now() - RECENT
        wanted = sa.select(TROUBLES).where(TROUBLES.c.model == model, TROUBLES.c.at >= since)
        with self._store.reading() as connection:
            rows = connection.execute(wanted.order_by(TROUBLES.c.at.desc())).all()
        return [dict(row._mapping) for row in rows]


def _place(worker: Worker) -> tuple[Any, ...]:
    return (
        TROUBLES.c.host == socket.gethostname(),
        TROUBLES.c.model == worker.model,
        TROUBLES.c.device == worker.device,
    )
