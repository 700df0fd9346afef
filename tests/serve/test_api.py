"""The API: what clients send, what they get, and the words that they are refused with."""

import base64
import io
import re

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from sparse_dit.serve.app import create_app
from sparse_dit.serve.media import preview_name, preview_steps
from sparse_dit.serve.options import Limits
from sparse_dit.serve.plans import Plans, Served
from tests.helpers.plan_cases import small
from tests.helpers.serve_cases import StubEngine, claimed, stub_card, stub_service, work, working

ASKED = {"prompt": "a cat"}
PLANS = Plans([Served("fast", small(), None)])


@pytest.fixture
def service(tmp_path):
    """A server without HTTP, with one plan."""
    limits = Limits(prompt=50, steps=20, frames=8, pixels=64 * 64, rate="1000/second")
    made = stub_service(tmp_path, stub_card(plans=PLANS), limits=limits, queue_size=5)
    yield made
    made.store.close()


@pytest.fixture
def client(service):
    """A client, to whom errors of the server are answers."""
    return TestClient(create_app(service), raise_server_exceptions=False)


def png(size=(32, 16)):
    """An image as a file."""
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return file.getvalue()


def test_a_video_from_submission_to_download(service, client):
    answer = client.post("/v1/videos", json=ASKED | {"compare": True})
    assert answer.status_code == 200
    job = answer.json()
    assert job["object"] == "video" and job["status"] == "queued" and job["progress"] == 0
    assert (job["size"], job["seconds"], job["plan"]) == ("32x16", "0.25", "fast")
    assert job["queue_position"] == 1 and job["variants"] == []
    one = f"/v1/videos/{job['id']}"
    assert client.get(f"{one}/content").status_code == 404
    work(service)
    job = client.get(one).json()
    assert (job["status"], job["progress"], job["step"], job["steps"]) == ("completed", 100, 6, 6)
    assert job["psnr_db"] > 30 and job["density"] == PLANS["fast"].plan.density
    assert job["summary"]["density"] == job["density"] and job["queue_position"] is None
    kinds = {}
    for variant in job["variants"]:
        answer = client.get(f"{one}/content", params={"variant": variant})
        assert answer.status_code == 200 and answer.content
        kinds[variant] = answer.headers["content-type"]
    assert kinds == {
        "video": "video/mp4",
        "thumbnail": "image/webp",
        "spritesheet": "image/jpeg",
        "dense": "video/mp4",
        "side_by_side": "video/mp4",
    }
    part = client.get(f"{one}/content", headers={"Range": "bytes=0-9"})
    assert part.status_code == 206 and len(part.content) == 10
    for step in job["previews"]:
        picture = client.get(f"{one}/previews/{step}")
        assert picture.headers["content-type"] == "image/webp" and picture.content
    assert client.get(f"{one}/previews/99").status_code == 404
    assert client.delete(one).json() == {
        "id": job["id"],
        "object": "video.deleted",
        "deleted": True,
    }
    assert client.get(one).status_code == 404 and client.delete(one).status_code == 404
    assert not (service.files.folder / job["id"]).exists()


def test_all_that_a_request_may_say(service, client):
    asked = {
        "prompt": "a dog",
        "model": "stub",
        "size": "48x32",
        "seconds": "0.5",
        "fps": 10,
        "seed": 7,
        "negative_prompt": "blurry",
        "num_inference_steps": 5,
        "guidance_scale": 4.5,
        "guidance_scale_2": 3.0,
        "flow_shift": 5.0,
        "plan": "dense",
    }
    fields = {name: (None, str(value)) for name, value in asked.items()}
    for answer in (client.post("/v1/videos", json=asked), client.post("/v1/videos", files=fields)):
        assert answer.status_code == 200, answer.text
        spec = service.store.get(answer.json()["id"]).spec
        assert (spec.width, spec.height, spec.num_frames, spec.fps) == (48, 32, 5, 10)
        assert (spec.seed, spec.steps, spec.negative_prompt) == (7, 5, "blurry")
        assert (spec.guidance, spec.guidance_2, spec.flow_shift) == (4.5, 3.0, 5.0)
        assert (spec.plan, spec.compare, spec.has_input) == ("dense", False, False)


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": "  "}, "prompt", "not empty"),
        ({"prompt": "a\x00b"}, "prompt", "control characters"),
        ({"prompt": "a" * 51}, "prompt", "at most 50 characters"),
        ({"negative_prompt": "a" * 51}, "negative_prompt", "at most 50 characters"),
        ({"size": "big"}, "size", "match pattern"),
        ({"size": "33x16"}, None, "multiple of 16"),
        ({"size": "640x640"}, "size", "at most 4,096 pixels in all, got 409,600"),
        ({"num_frames": 9}, "num_frames", "at most 8 frames, got 9"),
        ({"seconds": "3"}, "num_frames", "at most 8 frames, got 24"),
        ({"num_inference_steps": 21}, "num_inference_steps", "at most 20 steps"),
        ({"num_inference_steps": 0}, "num_inference_steps", "greater than or equal to 1"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"guidance_scale": "nan"}, "guidance_scale", "finite"),
        ({"model": "other"}, "model", "model must be stub"),
        ({"plan": "../../etc/passwd"}, None, "plan must be one of fast, dense"),
        ({"plan": "dense", "speedup": 2}, None, "leave out speedup"),
        ({"speedup": 2}, None, "no other points"),
        ({"plan": "dense", "compare": True}, "compare", "name a plan"),
        ({"loras": []}, "loras", "Extra inputs"),
        ({"input_reference": {"image_url": "http://host/x"}}, None, "image_url"),
        ({"input_reference": {"image_url": "data:image/png,x"}}, "input_reference", "base64"),
    ],
)
def test_what_cannot_be_met_is_refused_with_the_field(client, change, param, words):
    answer = client.post("/v1/videos", json=ASKED | change)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and error["code"] == "invalid_request"
    assert words in error["message"] and (param is None or error["param"] == param), error


def test_bodies_that_are_no_request(client):
    for content in (b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000):
        answer = client.post(
            "/v1/videos", content=content, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400 and answer.json()["error"]["message"]
    answer = client.post("/v1/videos", content="x", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    answer = client.post(
        "/v1/videos", content="x", headers={"content-type": "multipart/form-data; boundary=b"}
    )
    assert answer.status_code == 400
    twice = [("prompt", (None, "a")), ("prompt", (None, "b"))]
    assert "once" in client.post("/v1/videos", files=twice).json()["error"]["message"]


def test_an_image_comes_as_a_file_or_in_the_request(tmp_path):
    service = stub_service(tmp_path, stub_card(plans=PLANS, image="must"))
    client = TestClient(create_app(service))
    assert "needs an image" in client.post("/v1/videos", json=ASKED).json()["error"]["message"]
    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    inline = client.post("/v1/videos", json=ASKED | {"input_reference": {"image_url": url}})
    name = "../../etc/passwd"
    upload = client.post("/v1/videos", data=ASKED, files={"input_reference": (name, png())})
    fields = {"prompt": (None, "a cat"), "input_reference[image_url]": (None, url)}
    form = client.post("/v1/videos", files=fields)
    for answer in (inline, upload, form):
        id = answer.json()["id"]
        assert service.files.uploaded(id).read_bytes() == png()
    work(service)
    assert service.store.counts()["completed"] == 3
    service.store.close()


def test_a_model_that_takes_no_image_says_so(client):
    answer = client.post("/v1/videos", data=ASKED, files={"input_reference": ("x.png", png())})
    assert answer.json()["error"]["param"] == "input_reference"


def test_a_full_queue_answers_429_with_when_to_come_again(service, client):
    codes = [client.post("/v1/videos", json=ASKED).status_code for _ in range(6)]
    assert codes == [200] * 5 + [429]
    refused = client.post("/v1/videos", json=ASKED)
    assert int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["code"] == "queue_full"
    claimed(service)
    assert client.post("/v1/videos", json=ASKED).status_code == 200
    assert {folder.name for folder in service.files.folder.iterdir()} == set()


def test_the_same_key_gives_the_same_job(service, client):
    key = {"Idempotency-Key": "order-17"}
    first = client.post("/v1/videos", json=ASKED, headers=key).json()["id"]
    assert client.post("/v1/videos", json=ASKED, headers=key).json()["id"] == first
    other = client.post("/v1/videos", json={"prompt": "a dog"}, headers=key)
    assert other.status_code == 409 and other.json()["error"]["code"] == "idempotency_conflict"
    work(service)
    assert client.post("/v1/videos", json=ASKED, headers=key).json()["status"] == "completed"
    for wrong in ("", "k" * 300, "ä"):
        headers = {b"Idempotency-Key": wrong.encode()}
        assert client.post("/v1/videos", json=ASKED, headers=headers).status_code == 400


def test_a_list_goes_on_where_it_ended(client):
    ids = [client.post("/v1/videos", json=ASKED).json()["id"] for _ in range(3)]
    page = client.get("/v1/videos", params={"limit": 2}).json()
    assert [video["id"] for video in page["data"]] == ids[:0:-1]
    assert page["has_more"] and (page["first_id"], page["last_id"]) == (ids[2], ids[1])
    rest = client.get("/v1/videos", params={"limit": 2, "after": ids[1]}).json()
    assert [video["id"] for video in rest["data"]] == ids[:1] and not rest["has_more"]
    assert client.get("/v1/videos", params={"after": "video_x"}).status_code == 404
    for wrong in ({"limit": 0}, {"limit": 101}, {"order": "best"}):
        assert client.get("/v1/videos", params=wrong).status_code == 400


def test_a_job_is_cancelled_and_stays_in_the_list(service, client):
    id = client.post("/v1/videos", json=ASKED).json()["id"]
    assert client.post(f"/v1/videos/{id}/cancel").json()["status"] == "cancelled"
    assert client.get(f"/v1/videos/{id}").json()["status"] == "cancelled"
    assert client.get(f"/v1/videos/{id}/content").status_code == 404
    assert client.post("/v1/videos/video_x/cancel").status_code == 404
    running = client.post("/v1/videos", json=ASKED).json()["id"]
    claimed(service)
    assert client.post(f"/v1/videos/{running}/cancel").json()["cancelling"] is True


def test_a_preview_that_went_with_its_job_is_no_error(service, client):
    one = f"/v1/videos/{client.post('/v1/videos', json=ASKED).json()['id']}"
    job = claimed(service)
    first = min(preview_steps(job.picture.steps))
    with service.files.attempt(job) as folder:
        assert client.get(f"{one}/previews/{first}").status_code == 204, "not yet"
        (folder / preview_name(first)).write_bytes(b"a picture")
        assert client.get(f"{one}/previews/{first}").content == b"a picture"
        client.post(f"{one}/cancel")
    gone = client.get(f"{one}/previews/{first}")
    assert (gone.status_code, gone.content) == (204, b"")
    assert gone.headers["cache-control"] == "no-store", "another attempt may make it"
    assert client.get(f"{one}/previews/{job.picture.total_steps}").status_code == 404, "never"


def test_a_failed_job_says_why(service, client):
    id = client.post("/v1/videos", json={"prompt": "memory"}).json()["id"]
    work(service)
    answer = client.get(f"/v1/videos/{id}")
    assert answer.status_code == 200 and answer.json()["status"] == "failed"
    assert answer.json()["error"]["code"] == "out_of_memory"
    content = client.get(f"/v1/videos/{id}/content")
    assert content.status_code == 422 and "memory" in content.json()["error"]["message"]


def test_a_variant_that_was_not_made(service, client):
    id = client.post("/v1/videos", json=ASKED).json()["id"]
    work(service)
    answer = client.get(f"/v1/videos/{id}/content", params={"variant": "dense"})
    assert answer.status_code == 404 and "without compare" in answer.json()["error"]["message"]
    assert client.get(f"/v1/videos/{id}/content?variant=x").status_code == 400


def test_sync_answers_with_the_file(service, client):
    with working(service):
        answer = client.post("/v1/videos/sync", json=ASKED)
        failed = client.post("/v1/videos/sync", json={"prompt": "broken"})
    assert answer.status_code == 200 and answer.headers["content-type"] == "video/mp4"
    assert answer.headers["x-model"] == "stub" and float(answer.headers["x-inference-time-s"]) >= 0
    job = service.store.get(answer.headers["x-request-id"])
    assert answer.content == service.files.file(job, "video.mp4").read_bytes()
    assert failed.status_code == 422 and failed.json()["error"]["code"] == "internal_error"


def test_images_are_for_models_that_make_images(tmp_path, client):
    assert "makes videos" in client.post("/v1/images/generations", json=ASKED).text
    service = stub_service(tmp_path / "images", stub_card("image"))
    client = TestClient(create_app(service))
    assert "use /v1/images" in client.post("/v1/videos", json=ASKED).text
    with working(service, StubEngine(encode=True)):
        answer = client.post("/v1/images/generations", json=ASKED | {"n": 2, "seed": 5}).json()
    assert [picture["seed"] for picture in answer["data"]] == [5, 6]
    picture = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert picture.size == (32, 16)
    assert client.get("/v1/videos").json()["data"] == []
    service.store.close()


def test_the_model_with_its_plans_and_limits(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["kind"], model["default_plan"]) == ("stub", "video", "fast")
    assert model["plans"][0]["name"] == "fast" and model["limits"]["steps"] == 20
    assert model["defaults"]["width"] == 32


def test_health_and_metrics(service, client):
    answer = client.get("/health")
    assert answer.status_code == 503 and answer.json()["status"] == "failing"
    client.post("/v1/videos", json=ASKED)
    text = client.get("/metrics").text
    assert re.search(r'^sparse_dit_jobs{status="queued"} 1.0$', text, re.M)
    assert "sparse_dit_bytes 0.0" in text


def test_the_page_of_the_api_asks_no_other_host(client):
    page = client.get("/docs").text
    assert "swagger" in page and not re.search(r"(src|href)=\"https?:", page)
    assert client.get("/nothing").json()["error"]["type"] == "not_found_error"
    assert client.put("/v1/videos").status_code == 405
