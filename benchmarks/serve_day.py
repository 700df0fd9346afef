"""A day's jobs of a server in minutes: whether its memory and its open files stay what they were.

    python -m benchmarks.serve_day --jobs 4320

4,320 jobs are 24 hours of one every 20 seconds. They run on the stub of the tests, which takes no time, so
that all else of a job is done as often as in a day: submission, claim, steps, preview, files, polls, deletion
as their time is over. Memory and files are of the server's process and of its worker's, after each tenth.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
import psutil

from sparse_dit.serve.jobs import ENDED
from tests.helpers.serve_load import StubServer, wait_until

POLLS = 3  # of each job, as a page does
TTL = 20.0  # seconds after which a job and its files are deleted
WAITING = 50  # jobs that wait at most


def main() -> None:
    """Run the jobs, and print what was seen as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=4320)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        server = StubServer(Path(folder), step_seconds=0.0, ttl=TTL, encode=True)
        server.start()
        wait_until(lambda: len(_processes(server)) == 2)
        try:
            seen, ended = _day(server, given.jobs)
        finally:
            server.stop()
    said = {
        "jobs": given.jobs,
        "ended as": ended,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "MiB of the server, of its worker; files of each; jobs and folders in the store": seen,
    }
    text = json.dumps(said, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


def _day(server: StubServer, jobs: int) -> tuple[list[list[int]], dict[str, int]]:
    """What was seen after each tenth of the jobs, and how many ended in which way."""
    client, seen, known = httpx2.Client(base_url=server.url, timeout=60), [], {}
    for number in range(jobs):
        asked = {"prompt": "a cat", "seed": number, "num_frames": 2 + number % 4}
        id = client.post("/v1/videos", json=asked).raise_for_status().json()["id"]
        known[id] = None
        if number % 20 == 0:
            client.post(f"/v1/videos/{id}/cancel")
        for _ in range(POLLS):
            client.get(f"/v1/videos/{id}")
        client.get("/")
        _look(client, known, WAITING)
        if (number + 1) % max(1, jobs // 10) == 0:
            seen.append(_sizes(server))
    until = time.monotonic() + 10 * TTL
    while any(status is None for status in known.values()) and time.monotonic() < until:
        _look(client, known, 0)
    ended = list(known.values())
    return seen, {str(status): ended.count(status) for status in {*ended}}


def _look(client: Any, known: dict[str, str | None], most: int) -> None:
    """Note how jobs ended, until at most so many haven't."""
    for id in [id for id, status in known.items() if status is None]:
        if sum(status is None for status in known.values()) <= most:
            return
        answer = client.get(f"/v1/videos/{id}")
        while answer.status_code == 200 and answer.json()["status"] not in ENDED:
            time.sleep(0.01)
            answer = client.get(f"/v1/videos/{id}")
        known[id] = answer.json()["status"] if answer.status_code == 200 else "deleted unseen"


def _processes(server: StubServer) -> list[psutil.Process]:
    process = psutil.Process(server.process.pid)
    spawned = [p for p in process.children() if "spawn_main" in " ".join(p.cmdline())]
    return [process, *spawned]


def _sizes(server: StubServer) -> list[int]:
    processes = _processes(server)
    memory = [process.memory_info().rss >> 20 for process in processes]
    files = [process.num_fds() for process in processes]
    folders = sum(1 for _ in (server.folder / "files").iterdir())
    counts = httpx2.get(f"{server.url}/health").json()["jobs"]
    return [*memory, *files, sum(counts.values()), folders]


if __name__ == "__main__":
    main()
