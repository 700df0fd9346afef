"""Every call of docs/serving.md, sent to a server."""

import re
import shlex
from urllib.parse import urlsplit

from fastapi.testclient import TestClient

from sparse_dit.serve.app import create_app
from tests.helpers.documents import words_of
from tests.helpers.serve_cases import stub_service, working

PAGE = "docs/serving.md"


def calls(page=PAGE):
    """The words of each curl of a page, without comments."""
    text = words_of(page).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in re.findall(r"^curl .*$", text, re.M)]


def sent(client, words, id):
    """The answer to a curl."""
    method, url, given = None, None, {"files": {}, "headers": {}}
    rest = iter(words[1:])
    for word in rest:
        if word == "-X":
            method = next(rest)
        elif word == "-H":
            name, _, value = next(rest).partition(": ")
            given["headers"][name] = value
        elif word == "-d":
            given["content"] = next(rest)
        elif word == "-F":
            name, _, value = next(rest).partition("=")
            given["files"][name] = (None, value)
        elif word == "-o":
            next(rest)
        else:
            url = urlsplit(word)
    assert url.netloc == "127.0.0.1:8000"
    posts = given["files"] or "content" in given
    path = url.path.replace("ID", id) + (f"?{url.query}" if url.query else "")
    return client.request(method or ("POST" if posts else "GET"), path, **given)


def test_every_call_is_answered(tmp_path):
    service = stub_service(tmp_path)
    client = TestClient(create_app(service))
    seen = set()
    with working(service):
        for words in calls():
            url = next(word for word in words if word.startswith("http"))
            asked = {"prompt": "a cat", "num_inference_steps": 6}
            id = client.post("/v1/videos/sync", json=asked).headers["x-request-id"]
            # the stub has no plan to compare
            answer = sent(client, [word.replace(', "compare": true', "") for word in words], id)
            expected = 503 if url.endswith("/health") else 200  # without a worker's process
            assert answer.status_code == expected, (words, answer.text)
            seen.add((answer.request.method, re.sub(r"video_\w+|\d+$", "X", urlsplit(url).path)))
    described = client.get("/openapi.json").json()["paths"]
    every = {
        (method.upper(), re.sub(r"{\w+}", "X", path))
        for path, methods in described.items()
        for method in methods
    }
    shown = {(method, path.replace("ID", "X")) for method, path in seen}
    images = {call for call in every if call[1].startswith("/v1/images")}
    assert every - images <= shown, "a curl for each call"
    alike = {(method, path.replace("/v1/videos", "/v1/images")) for method, path in shown}
    own = ("POST", "/v1/images/generations")
    assert own in images and images - {own} <= alike, "the same as of videos"
    service.store.close()
