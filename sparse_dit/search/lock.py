"""One writer to a profile at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


@contextlib.contextmanager
def only_writer(path: str | Path, wanted: bool = True) -> Iterator[None]:
    """Hold the lock on a profile file; the lock is a hidden file beside it, which stays there empty.

    Args:
        path: The profile file.
        wanted: Otherwise nothing is locked.

    Raises:
        ValueError: If another process holds it; at once, in one line.
    """
    if not wanted:
        yield
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another process is writing the profile {path}; wait for it, or name another file"
        ) from None
    try:
        yield
    finally:
        lock.release()
