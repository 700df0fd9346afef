"""Replicas on Ray: what they ask for, what is refused, and, where Ray is installed, a kill in the middle."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparse_dit import cli
from sparse_dit.serve.replicas import Replica, Scaling, wanted_replicas
from tests.helpers.serve_cases import MODEL, SPEC, LoadStub, claimed, stub_service, stub_workers

RAY = importlib.util.find_spec("ray") is not None
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("said", "now", "wanted"),
    [
        (None, 1, 0),
        ({"waiting": {"a": 3.0, "b": 2.5}, "running": {"a": 1.0, "b": 1.0}}, 1, 4),
        ({"waiting": {"a": 0.0}, "running": {"a": 1.0}}, 3, 3),
        ({"waiting": {"a": 0.0}, "running": {"a": 0.0}}, 3, 0),
    ],
)
def test_there_is_a_replica_for_each_job_and_none_is_stopped_while_one_runs(said, now, wanted):
    context = SimpleNamespace(aggregated_metrics=said, target_num_replicas=now)
    assert wanted_replicas(context) == (wanted, {})


def test_a_replica_is_a_server_that_says_how_long_its_models_queue_is(tmp_path):
    service = stub_service(tmp_path)
    for model in (MODEL, MODEL, "another"):
        service.store.submit(SPEC, model, limit=10)
    assert claimed(service) is not None
    replica = Replica(lambda: (service, stub_workers(service, LoadStub())))
    assert replica.record_autoscaling_stats() == {"waiting": 1, "running": 1}
    assert "/v1/videos" in replica.__serve_build_asgi_app__().openapi()["paths"]
    service.store.close()


@pytest.mark.parametrize("least_and_most", [(0, 1), (2, 1)])
def test_bounds_that_are_none_are_refused(least_and_most):
    with pytest.raises(ValueError, match="at least 1 and at most"):
        Scaling(*least_and_most)


def test_what_replicas_cannot_be_is_said_in_one_line(capsys):
    asked = ["serve", "tiny-wan", "--plan", "tiny-wan", "--ray"]
    assert cli.run([*asked, "--min-replicas", "3"]) == 2
    assert "--min-replicas must be at least 1 and at most --max-replicas" in capsys.readouterr().err
    devices = ["--device", "cpu", "--device", "cpu"]
    assert cli.run([*asked, *devices]) == 2
    words = "each replica has one device" if RAY else "pip install 'sparse_dit[ray]'"
    assert words in capsys.readouterr().err


@pytest.mark.skipif(not RAY, reason="Ray isn't installed")
def test_jobs_survive_the_kill_of_a_replica():
    command = [sys.executable, "-m", "tests.helpers.ray_load", "--jobs", "30"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout[done.stdout.index("{") :])
    assert said["faults"] == [] and said["begun more than once"] == 1
    assert said["answers by status"] == {"completed": 120} and said["answers to downloads"] == [200]
    assert said["workers that ran jobs"] >= 2
