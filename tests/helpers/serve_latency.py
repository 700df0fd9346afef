"""How long a submission takes while a generation runs, and what serving adds to one.

`python -m tests.helpers.serve_latency --url http://127.0.0.1:8000 --steps 12` asks a server of a real model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import httpx2

PROMPT = "a red square moves up over gray checks"


def main() -> None:
    """Submit, and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--generations", type=int, default=2)
    given = parser.parse_args()
    asked = {"prompt": PROMPT, "num_inference_steps": given.steps}
    with httpx2.Client(base_url=given.url, timeout=600) as client:
        running = client.post("/v1/videos", json=asked).json()["id"]
        while client.get(f"/v1/videos/{running}").json()["step"] < 1:
            time.sleep(0.2)
        submits = []
        for _ in range(given.count):
            began = time.perf_counter()
            answer = client.post("/v1/videos", json=asked)
            submits.append(time.perf_counter() - began)
            client.delete(f"/v1/videos/{answer.raise_for_status().json()['id']}")
            time.sleep(0.05)
        still = client.get(f"/v1/videos/{running}").json()["status"]
        overheads = []
        for _ in range(given.generations):
            while client.get(f"/v1/videos/{running}").json()["status"] != "completed":
                time.sleep(0.2)
            began = time.time()
            running = client.post("/v1/videos", json=asked).json()["id"]
            while (job := client.get(f"/v1/videos/{running}").json())["status"] != "completed":
                time.sleep(0.05)
            whole = time.time() - began
            overheads.append((whole, job["inference_time_s"], job["total_time_s"]))
    submits.sort()
    print(
        json.dumps(
            {
                "submit_ms": {
                    "median": round(1e3 * statistics.median(submits), 1),
                    "p95": round(1e3 * submits[int(0.95 * len(submits))], 1),
                    "most": round(1e3 * submits[-1], 1),
                    "count": len(submits),
                },
                "the job meanwhile": still,
                "seconds: from submission to file, in the pipeline, in the worker": overheads,
                "overhead": [round(whole / inside - 1, 4) for whole, inside, _ in overheads],
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
