"""A server and its workers as processes, killed at random points: nothing is lost, nothing ends twice."""

import httpx2
import pytest

from sparse_dit.serve.supervisor import ended_because
from tests.helpers.serve_load import StubServer, faults, run_load, wait_until


@pytest.fixture
def server(tmp_path):
    """A server's process."""
    made = StubServer(tmp_path / "store", step_seconds=0.02)
    made.start()
    yield made
    made.stop()


def test_jobs_survive_kills_of_the_server_and_its_worker(server):
    load, jobs = run_load(server, jobs=40, clients=8, kills=1, worker_kills=0)
    assert faults(load, jobs, server.folder) == []
    assert any(job.status == "cancelled" for job in jobs)
    assert any(job.attempt > 1 for job in jobs), "a kill met a job that ran"
    # a job that ends its worker is tried once more, and keeps why; the next one runs
    bad, good = (
        httpx2.post(f"{server.url}/v1/videos", json={"prompt": prompt}).json()["id"]
        for prompt in ("crash", "a cat")
    )

    def state(id):
        return httpx2.get(f"{server.url}/v1/videos/{id}").json()

    wait_until(lambda: state(good)["status"] == "completed")
    failed = state(bad)
    assert (failed["status"], failed["attempt"]) == ("failed", 2)
    assert failed["error"]["code"] == "worker_crashed" and "signal 9" in failed["error"]["message"]
    wait_until(lambda: httpx2.get(f"{server.url}/health").json()["status"] == "ok")


def test_the_end_of_a_process_in_words():
    assert ended_because(-9) == ("was killed (signal 9), as the system does when memory runs out")
    assert ended_because(-11) == "ended by SIGSEGV"
    assert ended_because(3) == "ended with exit code 3" and "200" in ended_because(-200)
