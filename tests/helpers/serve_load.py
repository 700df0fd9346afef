"""Clients that submit, cancel and poll while the server and its workers are killed.

`python -m tests.helpers.serve_load --jobs 200 --clients 20 --kills 3` says what came of it.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil

from sparse_dit.serve.jobs import ENDED, Job
from sparse_dit.serve.store import Store
from tests.helpers.serve_cases import store_url

PATIENCE = 240.0  # seconds for anything, on a busy machine


@dataclass
class StubServer:
    """A server's process, which can be killed and started again."""

    folder: Path
    workers: int = 1
    step_seconds: float = 0.01
    ttl: float | None = None
    encode: bool = False
    port: int = 0
    process: Any = None

    def start(self) -> None:
        """Start, and wait until it answers."""
        if not self.port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
        words = [sys.executable, "-m", "tests.helpers.stub_server", str(self.folder)]
        words += [str(self.port), "--workers", str(self.workers)]
        words += ["--step-seconds", str(self.step_seconds)]
        words += ["--ttl", str(self.ttl)] if self.ttl is not None else []
        words += ["--encode"] if self.encode else []
        self.process = subprocess.Popen(words, cwd=Path(__file__).parents[2])
        wait_until(self.answers)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def answers(self) -> bool:
        """Whether it does."""
        try:
            return httpx2.get(f"{self.url}/health", timeout=5).json()["status"] != "failing"
        except (httpx2.HTTPError, ValueError):
            return False

    def kill(self) -> None:
        """End it without a chance to tidy up; its workers end by themselves."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def kill_worker(self) -> int:
        """End a worker likewise; its process id is returned."""
        found = psutil.Process(self.process.pid).children()
        workers = [p for p in found if "spawn_main" in " ".join(p.cmdline())]
        victim = random.choice(workers)
        victim.kill()
        return victim.pid

    def stop(self) -> None:
        """End it as a service manager does."""
        self.process.terminate()
        self.process.wait(PATIENCE)


def wait_until(true: Any, seconds: float = PATIENCE) -> None:
    """Wait until it is.

    Raises:
        TimeoutError: If it doesn't become so.
    """
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            raise TimeoutError(f"nothing came of it in {seconds:.0f} s")
        time.sleep(0.05)


@dataclass
class Load:
    """What clients did."""

    submitted: dict[str, str] = field(default_factory=dict)  # idempotency key -> id
    cancelled: set[str] = field(default_factory=set)
    submit_seconds: list[float] = field(default_factory=list)

    def client(self, server: StubServer, number: int, jobs: int, cancel_share: float) -> None:
        """Submit jobs one after another, each until it is accepted, and cancel some."""
        chance = random.Random(number)
        for count in range(jobs):
            key = f"{number}-{count}"
            asked = {"prompt": "a cat", "seed": 1000 * number + count}
            self.submitted[key] = self.insist(server, key, asked)["id"]
            if chance.random() < cancel_share:
                with_id = self.submitted[key]
                if self.post(server, f"/v1/videos/{with_id}/cancel", {}, {}) is not None:
                    self.cancelled.add(with_id)

    def insist(self, server: StubServer, key: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Submit until the answer comes; the key makes it one job."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            answer = self.post(server, "/v1/videos", asked, {"Idempotency-Key": key})
            if answer is not None:
                return answer
            time.sleep(0.1)
        raise TimeoutError("a job wasn't accepted")

    def post(
        self, server: StubServer, path: str, asked: dict[str, Any], headers: dict[str, str]
    ) -> dict[str, Any] | None:
        """An answer; None if the server isn't there."""
        began = time.perf_counter()
        try:
            answer = httpx2.post(server.url + path, json=asked, headers=headers, timeout=30)
        except httpx2.HTTPError:
            return None
        if path == "/v1/videos":
            self.submit_seconds.append(time.perf_counter() - began)
        return answer.json() if answer.status_code == 200 else None


def run_load(
    server: StubServer, *, jobs: int, clients: int, kills: int, worker_kills: int, seed: int = 0
) -> tuple[Load, list[Job]]:
    """Let clients submit while the server is killed; wait for the end of all jobs, and give them by order."""
    load, chance = Load(), random.Random(seed)
    store = Store(store_url(server.folder), durable=False)
    with ThreadPoolExecutor(clients + 1) as pool:
        killing = pool.submit(_kill, server, store, jobs, kills, worker_kills, chance)
        each = jobs // clients
        done = [pool.submit(load.client, server, n, each, 0.15) for n in range(clients)]
        for future in [*done, killing]:
            future.result()
    wait_until(lambda: sum(store.counts()[status] for status in ENDED) >= jobs // clients * clients)
    found, _ = store.list("video", after=None, limit=10 * jobs, order="asc") or ([], False)
    store.close()
    return load, found


def _kill(
    server: StubServer, store: Store, jobs: int, kills: int, worker_kills: int, chance: Any
) -> None:
    """Kill after shares of the jobs have ended, somewhere within the next few."""
    acts = ["server"] * kills + ["worker"] * worker_kills
    chance.shuffle(acts)
    for number, act in enumerate(acts, 1):
        share = number * jobs // (len(acts) + 1)
        wait_until(lambda share=share: sum(store.counts()[s] for s in ENDED) >= share)
        wait_until(lambda: store.counts()["in_progress"] > 0)
        time.sleep(chance.random() * 0.1)
        if act == "worker":
            server.kill_worker()
        else:
            server.kill()
            server.start()


def faults(load: Load, jobs: list[Job], folder: Path) -> list[str]:
    """What went wrong; nothing, as it should be."""
    found = []
    ids = {job.id for job in jobs}
    if lost := set(load.submitted.values()) - ids:
        found.append(f"{len(lost)} jobs are lost")
    if len(load.submitted) != len(jobs):
        found.append(f"{len(load.submitted)} jobs were submitted, {len(jobs)} are there")
    states = Counter(job.status for job in jobs)
    if set(states) - {"completed", "cancelled"}:
        found.append(f"jobs ended as {dict(states)}")
    wrong = [j for j in jobs if j.status == "cancelled" and j.id not in load.cancelled]
    if wrong:
        found.append(f"{len(wrong)} jobs were cancelled that nobody cancelled")
    done = [job for job in jobs if job.status == "completed"]
    for job in done:
        made = [p for p in (folder / "files" / job.id).iterdir() if not p.name.startswith(".")]
        if len(made) != 1 or not (made[0] / "result.json").is_file():
            found.append(f"{job.id} has the results {[p.name for p in made]}")
    ended = Counter((folder / "ends.txt").read_text().split())
    again = [job for job in done if ended[str(job.spec.seed)] > job.attempt]
    if again:
        found.append(f"{len(again)} jobs came to their end more often than they were begun")
    starts = [job.started_at or 0 for job in done if job.attempt == 1]
    if starts != sorted(starts):
        found.append("jobs weren't begun in order")
    return found


def main() -> None:
    """Run the load and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--worker-kills", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        server = StubServer(Path(name), given.workers)
        began = time.monotonic()
        server.start()
        load, jobs = run_load(
            server,
            jobs=given.jobs,
            clients=given.clients,
            kills=given.kills,
            worker_kills=given.worker_kills,
            seed=given.seed,
        )
        server.stop()
        said = {
            "jobs": len(jobs),
            "states": Counter(job.status for job in jobs),
            "begun more than once": sum(job.attempt > 1 for job in jobs),
            "seconds": round(time.monotonic() - began, 1),
            "faults": faults(load, jobs, Path(name)),
        }
    print(json.dumps(said, indent=2))


if __name__ == "__main__":
    main()
