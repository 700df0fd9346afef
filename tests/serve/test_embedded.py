"""Jobs on the embedded model, from the command's options to the files."""

import pytest
from fastapi.testclient import TestClient

from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.integrations import components
from sparse_dit.search import search_plan
from sparse_dit.search.front import front_path, write_front
from sparse_dit.serve.app import create_app
from sparse_dit.serve.claims import Claims, Worker
from sparse_dit.serve.command import Served, prepared
from sparse_dit.serve.options import ServeOptions
from sparse_dit.serve.tables import database_url
from tests.helpers.search_cases import stub_costs
from tests.helpers.serve_cases import runner_of

ASKED = {"prompt": "a red square moves up over gray checks", "seed": 3, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def served(short_model, short_pipe, tmp_path_factory):
    """A client, the service, and a worker in this process that has loaded the model once."""
    folder = tmp_path_factory.mktemp("served")
    settings = GenerationSettings(32, 64, 9, steps=3, guidance=1.0, max_sequence_length=16)
    with pytest.MonkeyPatch.context() as patched:
        stub_costs(patched)
        cases = (Case("a red circle"), Case("a blue square", 1))
        found = search_plan(short_pipe, cases, settings=settings, target_speedup=1.01)
    plan = folder / "made.json"
    found.plan.save(plan)
    write_front(found.front, front_path(plan))
    options = ServeOptions(store=database_url(str(folder)), files=str(folder / "files"))
    asked = Served(short_model, (str(plan), "tiny-wan"))
    with pytest.raises(ValueError, match="layers"):
        prepared(asked, options)  # the shipped plan is for all six layers
    service, (worker,) = prepared(Served(short_model, (str(plan),)), options)
    runner = runner_of(service, worker.load("cpu"))
    yield TestClient(create_app(service)), service, runner, found
    service.store.close()


def run(served, **asked):
    """What came of a request."""
    client, service, runner, _ = served
    answer = client.post("/v1/videos", json=ASKED | asked)
    assert answer.status_code == 200, answer.text
    worker = Worker("w", service.card.name, "cpu", service.card.plans.names)
    job = Claims(service.store).claim(worker)
    runner.run(job)
    return client.get(f"/v1/videos/{answer.json()['id']}").json()


def test_a_plan_beside_dense_with_the_same_seed(served):
    client, _, _, found = served
    middle = min(found.front.points, key=lambda point: abs(point.density - 0.5))
    video = run(served, compare=True, speedup=middle.speedup)
    assert video["status"] == "completed", video["error"]
    assert video["size"] == "64x32" and video["num_frames"] == 9, "as the plan was made with"
    assert 0 < video["density"] < 1 and video["psnr_db"] > 10 and video["ssim"] > 0
    stages = video["summary"]["stages"]
    assert (
        sum(stage["sparse_calls"] for stage in stages) > 0 and "density" in video["summary"]["text"]
    )
    assert video["inference_time_s"] > 0 and video["dense_time_s"] > 0
    dense = run(served, plan="dense")
    assert dense["summary"] is None and dense["density"] is None
    files = [
        client.get(f"/v1/videos/{one['id']}/content", params={"variant": variant}).content
        for one, variant in ((video, "dense"), (dense, "video"))
    ]
    assert files[0] == files[1], "stock again, bit for bit, in the same pipeline"
    assert video["psnr_db"] < 90, "another video than dense"


def test_points_of_a_front_are_switched_without_loading(served):
    client, _, runner, _ = served
    before = components(runner.engine.pipe)["transformer"]
    (listed,) = client.get("/v1/models").json()["data"][0]["plans"]
    speedups = [point["speedup"] for point in listed["front"]]
    assert len(speedups) > 1 and listed["name"] == "made"
    densities = [run(served, speedup=speedup)["density"] for speedup in (speedups[-1], speedups[0])]
    assert densities[0] < densities[1]
    assert components(runner.engine.pipe)["transformer"] is before
    refused = client.post("/v1/videos", json=ASKED | {"speedup": 900})
    assert (
        refused.status_code == 400 and "the front goes from" in refused.json()["error"]["message"]
    )


def test_what_the_pipeline_takes_is_told_before_a_job_waits(served):
    client = served[0]
    for change, words in (
        ({"size": "40x40"}, "multiple of 16"),
        ({"guidance_scale_2": 2.0}, "boundary_ratio"),
        ({"input_reference": {"image_url": "data:image/png;base64,aaaa"}}, "takes no image"),
    ):
        answer = client.post("/v1/videos", json=ASKED | change)
        assert answer.status_code == 400, answer.text
        assert words in answer.json()["error"]["message"]
    shifted = run(served, flow_shift=5.0)
    plain = run(served)
    assert shifted["status"] == plain["status"] == "completed"
    contents = [client.get(f"/v1/videos/{one['id']}/content").content for one in (shifted, plain)]
    assert contents[0] != contents[1]
