"""How long a submission takes while a generation runs, and what serving adds to a generation.

    python benchmarks/serve_latency.py --steps 12

It starts `sparse-dit serve tiny-wan --plan tiny-wan` (4,608 tokens), submits while its one worker generates,
and then runs jobs that don't wait. The machine should have nothing else to do. `--url` asks another server.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

from sparse_dit.environment import cpu_name

PROMPT = "a red square moves up over gray checks"
PATIENCE = 600.0  # seconds
BETWEEN = 0.05  # seconds between two submissions


def main() -> None:
    """Submit, and print how long it took as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="of a server; without, one is started")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--count", type=int, default=100, help="submissions during the generation")
    parser.add_argument("--generations", type=int, default=3, help="jobs that don't wait")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    busy = os.getloadavg()[0]
    with _server() if given.url is None else contextlib.nullcontext(given.url) as url:
        client = httpx2.Client(base_url=url, timeout=PATIENCE)
        asked = {"prompt": PROMPT, "num_inference_steps": given.steps}
        _whole(client, asked)  # the first one of a worker builds what later ones find
        during = _submissions(client, asked, given.count)
        overheads = [_whole(client, asked) for _ in range(given.generations)]
    said = {
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "load before": round(busy, 2),
        "load after": round(os.getloadavg()[0], 2),
        **during,
        "seconds: submission to file, in the pipeline": [
            [round(s, 3) for s in o] for o in overheads
        ],
        "overhead": [round(whole / inside - 1, 4) for whole, inside in overheads],
    }
    text = json.dumps(said, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def _server() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "sparse_dit", "serve", "tiny-wan", "--plan", "tiny-wan", "--store", folder]
        words += ["--port", str(port), "--queue-size", "10000", "--rate", "100000/second"]
        process = subprocess.Popen([sys.executable, *words], stderr=subprocess.DEVNULL)
        try:
            url = f"http://127.0.0.1:{port}"
            until = time.monotonic() + PATIENCE
            while not _ready(url):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError("the server doesn't start")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait()


def _ready(url: str) -> bool:
    with contextlib.suppress(httpx2.HTTPError):
        return httpx2.get(f"{url}/health").json()["status"] == "ok"
    return False


def _submissions(client: Any, asked: dict[str, Any], count: int) -> dict[str, Any]:
    """Submit and delete while a job runs."""
    running, seconds = client.post("/v1/videos", json=asked).json()["id"], []
    _until(client, running, lambda job: job["step"] >= 1)
    while len(seconds) < count:
        if client.get(f"/v1/videos/{running}").json()["status"] == "completed":
            running = client.post("/v1/videos", json=asked).json()["id"]
            _until(client, running, lambda job: job["step"] >= 1)
        began = time.perf_counter()
        answer = client.post("/v1/videos", json=asked)
        seconds.append(time.perf_counter() - began)
        client.delete(f"/v1/videos/{answer.raise_for_status().json()['id']}")
        time.sleep(BETWEEN)
    _until(client, running, lambda job: job["status"] == "completed")
    seconds.sort()
    return {
        "submit_ms": {
            "median": round(1e3 * statistics.median(seconds), 1),
            "p95": round(1e3 * seconds[math.ceil(0.95 * len(seconds)) - 1], 1),
            "most": round(1e3 * seconds[-1], 1),
            "count": len(seconds),
        }
    }


def _whole(client: Any, asked: dict[str, Any]) -> tuple[float, float]:
    """Seconds from submission to the finished file, and those in the pipeline, of a job that doesn't wait."""
    began = time.perf_counter()
    id = client.post("/v1/videos", json=asked).json()["id"]
    job = _until(client, id, lambda job: job["status"] == "completed")
    return time.perf_counter() - began, job["inference_time_s"]


def _until(client: Any, id: str, true: Any) -> dict[str, Any]:
    while not true(job := client.get(f"/v1/videos/{id}").json()):
        if job["status"] == "failed":
            raise RuntimeError(job["error"]["message"])
        time.sleep(0.05)
    return job


if __name__ == "__main__":
    main()
