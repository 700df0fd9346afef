"""The store on Postgres, where one is named; then all other tests of the server run on it too.

`SPARSE_DIT_TEST_POSTGRES=postgresql+psycopg://user@host/database pytest tests/serve`
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient

from sparse_dit.serve.app import create_app
from sparse_dit.serve.claims import Claims, Worker
from sparse_dit.serve.store import Store
from tests.helpers.serve_cases import MODEL, POSTGRES, SPEC, store_url, stub_service

pytestmark = pytest.mark.skipif(POSTGRES is None, reason="SPARSE_DIT_TEST_POSTGRES names none")


def test_many_that_open_an_empty_database_at_once_make_its_tables_once(tmp_path):
    url = store_url(tmp_path)
    assert url.startswith("postgresql")
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: Store(url), range(8)))
    ids = [store.submit(SPEC, MODEL, limit=10)[0].id for store in stores]
    assert [job.id for job in stores[0].list("video", after=None, limit=9, order="asc")[0]] == ids
    for store in stores:
        store.close()


def test_every_job_is_begun_once_while_clients_submit(tmp_path):
    service = stub_service(tmp_path)
    claims, begun = Claims(service.store), []

    def submit(number):
        for _ in range(20):
            service.store.submit(SPEC, MODEL, limit=1000)

    def claim(number):
        while len(begun) < 80:
            job = claims.claim(Worker(f"worker {number}", MODEL, "cpu", ("dense",)))
            if job is not None:
                begun.append(job.seq)

    with ThreadPoolExecutor(6) as pool:
        done = [pool.submit(submit, n) for n in range(4)] + [pool.submit(claim, n) for n in (0, 1)]
        for future in done:
            future.result()
    assert len(begun) == len({*begun}) == 80
    service.store.close()


def test_what_no_id_can_be_is_not_found(tmp_path):
    service = stub_service(tmp_path)
    client = TestClient(create_app(service))
    assert client.get("/jobs/video_%00").status_code == 404
    assert client.get("/?after=%00").status_code == 200
    assert client.get("/v1/videos?after=%00").status_code == 404
    service.store.close()
