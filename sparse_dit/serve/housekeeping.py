"""What is done every now and then: jobs of lost workers, and files whose time is over."""

from __future__ import annotations

import logging
import threading
import time

from .claims import Claims
from .files import Files
from .options import ServeOptions
from .store import Store

RECOVER = 1.0  # seconds between two looks for lost workers
SWEEP = 30.0  # seconds between two looks at the files
logger = logging.getLogger("sparse_dit.serve")


class Housekeeping:
    """A thread that recovers and sweeps.

    Args:
        store, files: What is looked after.
        options: How long what is kept.
    """

    def __init__(self, store: Store, files: Files, options: ServeOptions) -> None:
        self._store, self._files, self._options = store, files, options
        self._claims = Claims(store)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)

    def start(self) -> None:
        """Recover what an earlier server left, then go on in a thread."""
        self.recover()
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def recover(self) -> None:
        """Take the jobs of workers that are gone from them."""
        for id in self._claims.recover(self._files, self._options.half_run):
            logger.warning("job %s: its worker is gone", id)

    def sweep(self) -> None:
        """Delete jobs whose time is over, the first ones that are too much, and files of no job."""
        gone = self._store.expired()
        if self._options.max_store_bytes is not None:
            gone += self._store.oldest(self._options.max_store_bytes)
        for id in dict.fromkeys(gone):
            self._store.delete(id)
            self._files.remove(id)
        self._files.remove_strays(self._store.known())

    def _run(self) -> None:
        swept = 0.0
        while not self._stop.is_set():
            try:
                self.recover()
                if time.monotonic() - swept >= SWEEP:
                    self.sweep()
                    swept = time.monotonic()
            except Exception:
                logger.exception("housekeeping failed, and is tried again")
            self._stop.wait(RECOVER)
