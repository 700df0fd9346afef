"""A server of the stub as a process: `python -m tests.helpers.stub_server FOLDER PORT`."""

from __future__ import annotations

import argparse
from pathlib import Path

import uvicorn

from sparse_dit.serve.app import create_app
from sparse_dit.serve.options import Limits
from tests.helpers.serve_cases import LoadStub, stub_service, stub_workers


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--step-seconds", type=float, default=0.01)
    parser.add_argument("--ttl", type=float, default=None)
    parser.add_argument("--encode", action="store_true", help="write real videos")
    given = parser.parse_args()
    service = stub_service(
        given.folder, queue_size=1000, ttl=given.ttl, limits=Limits(rate="100000/second")
    )
    load = LoadStub(given.step_seconds, given.folder / "ends.txt", given.encode)
    app = create_app(service, stub_workers(service, load, given.workers))
    uvicorn.run(app, host="127.0.0.1", port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
