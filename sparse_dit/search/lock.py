"""One writer to a profile at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..outputs import check_writable
from ..words import option


@contextlib.contextmanager
def only_writer(path: str | Path, wanted: bool = True) -> Iterator[None]:
    """Hold the lock on a profile file; the lock is a hidden file beside it while it is held.

    Args:
        path: The profile file.
        wanted: Otherwise nothing is locked.

    Raises:
        ValueError: If another process holds it; at once, in one line.
        OSError: If its folder can't be written.
    """
    if not wanted:
        yield
        return
    path = Path(path)
    check_writable(path, option("profile"))
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another process is writing the profile {path}; wait for it, or name another file"
        ) from None
    try:
        yield
    finally:
        if os.name == "posix":  # elsewhere an open file stays; who locks a removed one tries again
            file.unlink(missing_ok=True)
        lock.release()
