"""A worker that can't become ready: people see why, on the page and in /health, until one is."""

from dataclasses import dataclass

import pytest
from fastapi.testclient import TestClient

from sparse_dit.serve.app import create_app
from sparse_dit.serve.claims import Claims, Worker
from sparse_dit.serve.store import Store
from sparse_dit.serve.supervisor import Supervisor
from sparse_dit.serve.troubles import RECENT, Troubles
from tests.helpers.page_cases import page_card
from tests.helpers.serve_cases import MODEL, stub_service, stub_workers
from tests.helpers.serve_load import wait_until

WORKER = Worker("one", MODEL, "cuda:0", ())


@dataclass(frozen=True)
class LoadNothing:
    """Fails as a folder without weights does."""

    def __call__(self, device):
        raise OSError("no weights <b>in</b> /models/wan")


@pytest.fixture
def service(tmp_path, request):
    """A server without HTTP."""
    made = stub_service(tmp_path, page_card(), **getattr(request, "param", {}))
    yield made
    made.store.close()


def test_a_worker_that_cannot_load_says_so_on_the_page_and_in_health(service):
    supervisor = Supervisor(stub_workers(service, LoadNothing()), Claims(service.store))
    supervisor.start()
    try:
        wait_until(lambda: Troubles(service.store).recent(MODEL))
    finally:
        supervisor.stop()
    client = TestClient(create_app(service))
    answer = client.get("/health")
    assert answer.status_code == 503 and answer.json()["status"] == "failing"
    (trouble,) = answer.json()["troubles"]
    assert trouble["device"] == "cpu:0" and trouble["seconds_ago"] < 60
    assert trouble["message"] == (
        "the model can't be loaded: OSError: no weights <b>in</b> /models/wan"
    )
    page = client.get("/").text
    assert "OSError: no weights &lt;b&gt;in&lt;/b&gt; /models/wan" in page


def test_a_trouble_is_told_until_a_worker_is_ready_there(service):
    clock = {"now": 1000.0}
    store = Store(service.store.url, now=lambda: clock["now"])
    troubles = Troubles(store)
    troubles.note(WORKER, "first")
    troubles.note(WORKER, "who only saw it end")
    other = Worker("two", MODEL, "cuda:1", ())
    troubles.note(other, "another device")
    assert {row["message"] for row in troubles.recent(MODEL)} == {"first", "another device"}
    assert troubles.recent("other model") == []
    troubles.note(Worker("three", MODEL, "cuda:0", ()), "again")
    troubles.over(other)
    assert [row["message"] for row in troubles.recent(MODEL)] == ["again"]
    clock["now"] += RECENT + 1
    assert troubles.recent(MODEL) == []
    store.close()


def test_a_ready_worker_counts_more_than_another_ones_trouble(service):
    Troubles(service.store).note(WORKER, "no memory")
    Claims(service.store).beat(Worker("two", MODEL, "cuda:1", ()), "idle")
    health = TestClient(create_app(service)).get("/health")
    assert health.status_code == 200 and health.json()["troubles"][0]["message"] == "no memory"


@pytest.mark.parametrize("service", [{"api_keys": ("right",)}], indirect=True)
def test_who_has_no_key_is_not_told_where_files_lie(service):
    Troubles(service.store).note(WORKER, "no file /models/secret")
    client = TestClient(create_app(service))
    assert "secret" not in client.get("/health").text and "secret" not in client.get("/").text
    assert "secret" in client.get("/", headers={"Authorization": "Bearer right"}).text
