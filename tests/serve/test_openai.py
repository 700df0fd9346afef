"""The openai package's own calls, against the server."""

import openai
import pytest
from fastapi.testclient import TestClient

from sparse_dit.serve.app import create_app
from sparse_dit.serve.plans import Plans, Served
from tests.helpers.plan_cases import small
from tests.helpers.serve_cases import stub_card, stub_service, work, working

PLANS = Plans([Served("fast", small(), None)])
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture
def service(tmp_path):
    """A server that wants a key."""
    made = stub_service(tmp_path, stub_card(plans=PLANS, image="may"), api_keys=("key",))
    yield made
    made.store.close()


@pytest.fixture
def client(service):
    """The package's client, whose requests go to the server."""
    http = TestClient(create_app(service))
    made = openai.OpenAI(
        api_key="key", base_url="http://testserver/v1", http_client=http, max_retries=0
    )
    yield made
    http.close()


def test_create_retrieve_list_download_delete(service, client):
    video = client.videos.create(
        prompt="a cat",
        model="stub",
        seconds="1",
        size="48x32",
        extra_body={"num_inference_steps": 4, "seed": 3, "compare": True},
    )
    assert (video.status, video.seconds, video.size) == ("queued", "1", "48x32")
    assert client.videos.retrieve(video.id).id == video.id
    other = client.videos.create(
        prompt="a dog", input_reference=("cat.png", b"\x89PNG", "image/png")
    )
    assert service.files.uploaded(other.id).read_bytes() == b"\x89PNG"
    assert [one.id for one in client.videos.list()] == [other.id, video.id]
    assert [one.id for one in client.videos.list(limit=1, order="asc")] == [video.id, other.id]
    work(service)
    done = client.videos.retrieve(video.id)
    assert done.status == "completed" and done.progress == 100 and done.completed_at
    assert done.model_extra["psnr_db"] > 30
    assert client.videos.retrieve(other.id).error.code == "invalid_request"
    file = client.videos.download_content(video.id)
    assert file.response.headers["content-type"] == "video/mp4" and file.content
    for variant in ("thumbnail", "spritesheet"):
        assert client.videos.download_content(video.id, variant=variant).content
    gone = client.videos.delete(video.id)
    assert gone.deleted and gone.id == video.id and gone.object == "video.deleted"
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_create_and_poll(service, client):
    with working(service):
        for asked in ({}, {"model": "stub"}):
            done = client.videos.create_and_poll(prompt="a cat", poll_interval_ms=50, **asked)
            assert (done.status, done.progress) == ("completed", 100)


def test_errors_are_the_packages_own(service, client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(prompt="a cat", size="33x16")
    assert "multiple of 16" in str(caught.value) and caught.value.code == "invalid_request"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").videos.list()
    video = client.videos.create(prompt="a cat")
    with pytest.raises(openai.NotFoundError, match="ask again later"):
        client.videos.download_content(video.id)
