"""Jobs on replicas of the stub on Ray, one of which is killed while it runs a job.

`python -m tests.helpers.ray_load --jobs 40` says what came of it; it needs `sparse_dit[ray]`,
and uses the cluster that RAY_ADDRESS names, or makes one.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import psutil

from sparse_dit.serve.claims import READY
from sparse_dit.serve.jobs import ENDED
from sparse_dit.serve.options import Limits
from sparse_dit.serve.replicas import OBJECTS, Scaling, application
from sparse_dit.serve.service import Service
from sparse_dit.serve.store import Store
from sparse_dit.serve.worker import WorkerOptions
from tests.helpers.serve_cases import LoadStub, store_url, stub_service, stub_workers
from tests.helpers.serve_load import Load, faults, wait_until

SCALING = Scaling(1, 2, cpus=0.5, idle_seconds=2.0, upscale_seconds=0.5)


def prepare(folder: Path, step_seconds: float) -> tuple[Service, Sequence[WorkerOptions]]:
    """What a replica runs."""
    limits = Limits(rate="100000/second")
    service = stub_service(folder, queue_size=1000, limits=limits)
    return service, stub_workers(service, LoadStub(step_seconds, folder / "ends.txt"))


def main() -> None:
    """Start a cluster on this machine, run the jobs, and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--step-seconds", type=float, default=0.2)
    given = parser.parse_args()
    import ray
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        if "RAY_ADDRESS" in os.environ:
            ray.init()
        else:
            ray.init(num_cpus=4, include_dashboard=False, object_store_memory=OBJECTS)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            folder = Path(name)
            prepared = functools.partial(prepare, folder, given.step_seconds)
            serve.run(application(prepared, SCALING, "cpu", "warning"), name="stub")
            said = _watched(f"http://127.0.0.1:{port}", folder, given.jobs)
        finally:
            serve.shutdown()
            ray.shutdown()
    print(json.dumps(said, indent=1))


def _watched(url: str, folder: Path, jobs: int) -> dict[str, Any]:
    store, load = Store(store_url(folder), durable=False), Load()
    with httpx2.Client(base_url=url, timeout=60) as client:
        wait_until(lambda: client.get("/health").json()["status"] == "ok")
        began = time.monotonic()
        for number in range(jobs):
            asked = {"prompt": "a cat", "seed": number}
            answer = client.post("/v1/videos", json=asked, headers={"Idempotency-Key": f"{number}"})
            load.submitted[f"{number}"] = answer.raise_for_status().json()["id"]
        wait_until(lambda: len(_ready(store)) == 2)
        scaled = time.monotonic() - began
        victim = _ready(store)[0]
        wait_until(lambda: any(job["worker"] == victim["id"] for job in _running(store)))
        replica = psutil.Process(victim["pid"]).parent()
        assert replica is not None and "ray" in " ".join(replica.cmdline()), replica.cmdline()
        replica.kill()
        killed = time.monotonic()
        wait_until(lambda: sum(store.counts()[status] for status in ENDED) >= jobs)
        ended = time.monotonic()
        workers = {row["id"] for row in _ready(store)} | {victim["id"]}
        # any replica knows every job: asked often enough for both to have answered
        known = Counter(
            _ask(client, f"/v1/videos/{id}")["status"]
            for _ in range(4)
            for id in load.submitted.values()
        )
        films = {_film(client, id) for id in load.submitted.values()}
        found, _ = store.list("video", after=None, limit=10 * jobs, order="asc") or ([], False)
        wait_until(lambda: len(_ready(store)) == 1)
    said = {
        "jobs": jobs,
        "begun more than once": sum(job.attempt > 1 for job in found),
        "workers that ran jobs": len({job.worker for job in found} | {victim["id"]}),
        "workers at the end": len(workers - {victim["id"]}),
        "answers by status": dict(known),
        "answers to downloads": sorted(films),
        "seconds until there were two replicas": round(scaled, 1),
        "seconds from the kill to the last job": round(ended - killed, 1),
        "seconds until one replica was left": round(time.monotonic() - ended, 1),
        "faults": faults(load, found, folder),
    }
    store.close()
    return said


def _ask(client: Any, address: str) -> Any:
    """An answer, asked for again where a replica died as it answered."""
    for _ in range(20):
        answer = client.get(address)
        if answer.status_code == 200:
            return answer.json()
        time.sleep(0.25)
    raise TimeoutError(f"{address}: {answer.status_code} {answer.text}")


def _film(client: Any, id: str) -> int:
    return client.get(f"/v1/videos/{id}/content").status_code


def _ready(store: Store) -> list[dict[str, Any]]:
    return [row for row in store.workers() if row["state"] in READY]


def _running(store: Store) -> list[dict[str, Any]]:
    found, _ = store.list("video", after=None, limit=1000, order="asc") or ([], False)
    return [{"worker": job.worker} for job in found if job.status == "in_progress"]


if __name__ == "__main__":
    main()
