"""Where the files of jobs lie, and how they come there whole."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..whole_file import whole_file, write_text
from .jobs import Job

RESULT = "result.json"  # written last
_ID = re.compile(r"[a-z]+_[0-9a-f]{32}")
STRAY_SECONDS = 3600.0  # a folder of no job is left so long, as its job may be about to come


class Files:
    """The folder of a store: a folder a job, in it one an attempt, named with a dot until it is complete.

    Args:
        folder: Made if it isn't there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def making(self, job: Job) -> Path:
        """Where what a job makes lies until it is complete."""
        return self.folder / job.id / f".{job.attempt}"

    def made(self, job: Job) -> Path:
        """Where what a job made lies."""
        return self.folder / job.id / str(job.attempt)

    def uploaded(self, id: str) -> Path:
        """Where the image that came with a request lies."""
        return self.folder / id / "input"

    def keep_upload(self, id: str, data: bytes) -> None:
        """Keep the image that came with a request."""
        with whole_file(self.uploaded(id)) as partial:
            partial.write_bytes(data)

    @contextlib.contextmanager
    def attempt(self, job: Job) -> Iterator[Path]:
        """An empty folder to write to; if it isn't published by the end of the block, it is gone."""
        for number in range(1, job.attempt):  # of workers that were killed
            shutil.rmtree(self.folder / job.id / f".{number}", ignore_errors=True)
        folder = self.making(job)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, job: Job, result: dict[str, Any]) -> int:
        """Say that what a job made is complete; its bytes are returned."""
        write_text(self.making(job) / RESULT, json.dumps(result))
        os.replace(self.making(job), self.made(job))
        return self.size(job)

    def result(self, job: Job) -> dict[str, Any] | None:
        """What came out, if what the job made is complete."""
        file = self.made(job) / RESULT
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def file(self, job: Job, name: str) -> Path | None:
        """A file that the job made, complete or not; None if there is none."""
        for folder in (self.made(job), self.making(job)):
            if (folder / name).is_file():
                return folder / name
        return None

    def read(self, job: Job, name: str, start: int = 0) -> bytes | None:
        """The bytes from `start` on of a file that the job made, complete or not; None if there is none."""
        for folder in (self.made(job), self.making(job), self.made(job)):  # published meanwhile
            with contextlib.suppress(FileNotFoundError), (folder / name).open("rb") as file:
                file.seek(start)
                return file.read()
        return None

    def size(self, job: Job) -> int:
        """Bytes of all that belongs to a job."""
        files = (self.folder / job.id).rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())

    def remove(self, id: str) -> None:
        """Delete all that belongs to a job."""
        shutil.rmtree(self.folder / id, ignore_errors=True)

    def remove_strays(self, known: Collection[str], age: float = STRAY_SECONDS) -> list[str]:
        """Delete folders of jobs that aren't known, and that nothing came into for `age` seconds."""
        removed = []
        for folder in self.folder.iterdir():
            if folder.name in known or not _ID.fullmatch(folder.name):
                continue
            with contextlib.suppress(FileNotFoundError):
                if time.time() - folder.stat().st_mtime >= age:
                    shutil.rmtree(folder, ignore_errors=True)
                    removed.append(folder.name)
        return removed
