"""Who may ask, for how much, how often; what is never opened, logged or told."""

import logging

import pytest
from fastapi.testclient import TestClient

from sparse_dit.serve.app import create_app
from sparse_dit.serve.options import Limits
from tests.helpers.serve_cases import stub_service

ASKED = {"prompt": "a secret cat"}
KEY = {"Authorization": "Bearer right"}


@pytest.fixture
def client(tmp_path, request):
    """A client of a server with the options of the test's parameter."""
    service = stub_service(tmp_path, **getattr(request, "param", {}))
    yield TestClient(create_app(service), raise_server_exceptions=False)
    service.store.close()


@pytest.mark.parametrize("client", [{"api_keys": ("other", "right")}], indirect=True)
def test_without_a_key_nothing_is_told_but_health(client):
    paths = ["/v1/videos", "/v1/videos/video_x", "/v1/models", "/metrics"]
    paths += ["/v1/videos/video_x/content", "/v1/videos/video_x/previews/1"]
    wrong = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}]
    wrong += [{"Authorization": "Bearer "}, {"Cookie": "sparse_dit_key=wrong"}]
    for headers in wrong:
        for path in paths:
            answer = client.get(path, headers=headers)
            assert answer.status_code == 401 and "www-authenticate" in answer.headers
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert client.post("/v1/videos", json=ASKED, headers=headers).status_code == 401
        assert client.delete("/v1/videos/video_x", headers=headers).status_code == 401
    for headers in (KEY, {"Authorization": "bearer other"}, {"Cookie": "sparse_dit_key=right"}):
        assert client.get("/v1/videos", headers=headers).status_code == 200
    assert client.get("/health").status_code == 503
    assert client.get("/v1/videos", headers={"Authorization": b"Bearer \xff"}).status_code == 401


@pytest.mark.parametrize("client", [{"limits": Limits(body=1000)}], indirect=True)
def test_a_body_that_is_too_large_is_refused_however_it_comes(client):
    large = {"prompt": "a" * 2000}
    pieces = (b'{"prompt": "' + b"a" * 500 for _ in range(9))
    answers = [
        client.post("/v1/videos", json=large),
        client.post("/v1/videos", files={"prompt": (None, "a" * 2000)}),
        client.post("/v1/videos", content=pieces, headers={"content-type": "application/json"}),
    ]
    assert [answer.status_code for answer in answers] == [413] * 3


@pytest.mark.parametrize("client", [{"limits": Limits(rate="3/hour")}], indirect=True)
def test_a_client_who_submits_too_often_is_told_when_to_come_again(client):
    codes = [client.post("/v1/videos", json=ASKED).status_code for _ in range(5)]
    assert codes == [200] * 3 + [429] * 2
    refused = client.post("/v1/videos", json=ASKED)
    assert 3000 < int(refused.headers["retry-after"]) <= 3600
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert client.get("/v1/videos").status_code == 200, "looking isn't limited"


def test_every_answer_keeps_browsers_from_doing_more_than_they_should(client):
    id = client.post("/v1/videos", json=ASKED).json()["id"]
    for path in ("/v1/videos", f"/v1/videos/{id}", "/health", "/docs", "/nothing"):
        headers = client.get(path).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"], path
        assert headers["x-content-type-options"] == "nosniff" and "server" not in headers
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}],
)
def test_pages_of_other_sites_cannot_ask(client, headers):
    answer = client.post("/v1/videos", files={"prompt": (None, "x")}, headers=headers)
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "cross_origin"
    own = {"Origin": "http://testserver", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/v1/videos", json=ASKED, headers=own).status_code == 200
    preflight = {**headers, "Access-Control-Request-Method": "POST"}
    assert (
        "access-control-allow-origin" not in client.options("/v1/videos", headers=preflight).headers
    )


@pytest.mark.parametrize("client", [{"hosts": ("127.0.0.1", "localhost")}], indirect=True)
def test_a_name_that_is_not_the_servers_is_refused(client):
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/health", headers={"Host": "localhost:8000"}).status_code == 503


@pytest.mark.parametrize("client", [{}, {"log_prompts": True}], indirect=True)
def test_prompts_are_logged_only_when_asked_for(client, caplog, request):
    with caplog.at_level(logging.DEBUG):
        id = client.post("/v1/videos", json=ASKED).json()["id"]
        client.post("/v1/videos", json={"prompt": "a secret cat", "size": "1x1"})
    assert id in caplog.text
    assert ("secret" in caplog.text) == bool(request.node.callspec.params["client"])


def test_nothing_is_found_by_a_path(client):
    for path in ("..%2f..%2fjobs.sqlite", "..", "%2e%2e", "video_x%00", "a" * 100):
        for end in ("", "/content", "/previews/1"):
            answer = client.get(f"/v1/videos/{path}{end}")
            assert answer.status_code in (400, 404) and b"SQLite" not in answer.content


def test_a_fault_of_the_server_tells_nothing_of_its_inside(client, monkeypatch):
    from sparse_dit.serve.store import Store

    def broken(*_args):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(Store, "get", broken)
    answer = client.get("/v1/videos/video_x")
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"
