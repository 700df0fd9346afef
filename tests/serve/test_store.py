"""The queue: order, bounds, who gets what, and what becomes of a lost worker's jobs."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from sparse_dit.serve.claims import ATTEMPTS, CRASHES, LEASE, STARTING, Claims, Worker
from sparse_dit.serve.jobs import new_id
from sparse_dit.serve.store import OtherRequest, QueueFull, Store
from sparse_dit.serve.tables import open_database
from tests.helpers.serve_cases import MODEL, SPEC, claimed, stub_service

WORKER = Worker("worker", MODEL, "cpu", ("dense",))


@pytest.fixture
def service(tmp_path):
    """A queue in a folder."""
    made = stub_service(tmp_path)
    yield made
    made.store.close()


@pytest.fixture
def store(service):
    """Its database."""
    return service.store


def submit(store, count=1, **options):
    """Put jobs into the queue; their ids."""
    jobs = [store.submit(SPEC, MODEL, limit=100, **options)[0] for _ in range(count)]
    return [job.id for job in jobs]


def test_jobs_are_claimed_in_the_order_in_which_they_came(service):
    ids = submit(service.store, 5)
    assert service.store.get(ids[3]).ahead == 3
    assert [claimed(service).id for _ in ids] == ids
    assert claimed(service) is None
    assert service.store.get(ids[0]).ahead is None


def test_every_job_is_claimed_once_by_many_at_a_time(service):
    ids = submit(service.store, 24)

    def take(number):
        found, claims = [], Claims(Store(service.store.url, durable=False))
        while job := claims.claim(replace(WORKER, id=f"worker {number}")):
            found.append(job.id)
        claims.store.close()
        return found

    with ThreadPoolExecutor(4) as pool:
        taken = [id for found in pool.map(take, range(4)) for id in found]
    assert sorted(taken) == sorted(ids)


def test_a_worker_gets_only_what_it_can_run(service):
    submit(service.store)
    claims = Claims(service.store)
    assert claims.claim(replace(WORKER, model="other")) is None
    assert claims.claim(replace(WORKER, plans=("fast",))) is None
    assert claims.claim(WORKER) is not None


def test_a_full_queue_refuses_even_many_at_a_time(service):
    def add(number):
        try:
            service.store.submit(SPEC, MODEL, limit=10)
            return True
        except QueueFull as error:
            return "10 jobs are waiting" not in str(error)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(add, range(30))) == 10
    assert service.store.counts()["queued"] == 10
    claimed(service)
    service.store.submit(SPEC, MODEL, limit=10)  # what runs doesn't wait


def test_an_idempotency_key_gives_the_same_job(store):
    first, new = store.submit(SPEC, MODEL, limit=1, key="k", fingerprint="a")
    again, other = store.submit(SPEC, MODEL, limit=1, key="k", fingerprint="a")
    assert (first.id, new, other) == (again.id, True, False)
    with pytest.raises(OtherRequest):
        store.submit(SPEC, MODEL, limit=1, key="k", fingerprint="b")
    assert store.counts()["queued"] == 1


def test_what_was_submitted_is_there_when_the_store_is_opened_again(service):
    (id,) = submit(service.store, ttl=60.0)
    service.store.close()
    found = Store(service.store.url).get(id)
    assert found.spec == SPEC and found.status == "queued"
    assert found.expires_at == found.created_at + 60


def test_a_job_that_waits_is_cancelled_at_once_and_one_that_runs_at_its_next_step(service):
    waiting, running = submit(service.store, 2)
    claims = Claims(service.store)
    assert service.store.cancel(waiting).status == "cancelled"
    job = claimed(service)
    assert job.id == running and claims.advance(job, 10, {"step": 1})
    assert service.store.cancel(running).status == "in_progress"
    assert not claims.advance(job, 20, {}) and not claims.complete(job, {}, 0)
    assert claims.stopped(job) and service.store.get(running).status == "cancelled"
    assert service.store.cancel("video_unknown") is None


def test_only_the_worker_that_holds_a_job_in_this_attempt_changes_it(service):
    (id,) = submit(service.store)
    claims = Claims(service.store)
    job = claimed(service, "first")
    assert claims.give_back(job) and not claims.give_back(job)
    later = claimed(service, "second")
    assert later.attempt == 2
    for late in (job, replace(later, attempt=1)):
        assert not claims.advance(late, 1, {}) and not claims.complete(late, {}, 0)
        assert not claims.fail(late, "x", "x")
    assert claims.complete(later, {"seconds": 1}, 5)
    assert not claims.complete(later, {"seconds": 2}, 5), "no job ends twice"
    assert service.store.get(id).result == {"seconds": 1}


def test_a_job_of_a_crashed_worker_is_run_again_once_and_keeps_why(service):
    ids = submit(service.store, 2)
    claims = Claims(service.store)
    for number in range(CRASHES):
        job = claimed(service, f"worker {number}")
        assert job.id == ids[0], "it keeps its place"
        claims.crashed(f"worker {number}", "the worker ended by SIGSEGV")
    job = service.store.get(ids[0])
    assert job.status == "failed" and job.attempt == CRASHES
    assert job.error == {"code": "worker_crashed", "message": "the worker ended by SIGSEGV"}
    assert claimed(service).id == ids[1]


@pytest.mark.parametrize("policy", ["restart", "fail"])
def test_half_run_jobs_are_restarted_in_order_or_failed(service, policy):
    ids = submit(service.store, 3)
    claims = Claims(service.store)
    for name in ("gone", "there"):
        claims.register(replace(WORKER, id=name), os.getpid(), "busy")
        claimed(service, name)
    claims.gone("gone")
    assert claims.recover(service.files, policy) == ids[:1]
    job = service.store.get(ids[0])
    assert job.status == ("queued" if policy == "restart" else "failed")
    assert policy == "restart" or job.error["code"] == "interrupted"
    assert service.store.get(ids[1]).status == "in_progress"
    assert claimed(service).id == ids[0 if policy == "restart" else 2]


def test_what_was_complete_or_cancelled_is_not_run_again(service):
    ids = submit(service.store, 2)
    jobs = [claimed(service, "gone") for _ in ids]
    with service.files.attempt(jobs[0]) as folder:
        (folder / "video.mp4").write_bytes(b"0123")
        service.files.publish(jobs[0], {"seconds": 2.0})
    service.store.cancel(ids[1])
    assert sorted(Claims(service.store).recover(service.files, "restart")) == sorted(ids)
    done, cancelled = map(service.store.get, ids)
    assert (done.status, done.progress, done.result) == ("completed", 100, {"seconds": 2.0})
    assert cancelled.status == "cancelled"


def test_a_server_that_always_ends_with_a_job_gives_it_up(service):
    (id,) = submit(service.store)
    for _ in range(ATTEMPTS):
        assert claimed(service, "gone") is not None
        Claims(service.store).recover(service.files, "restart")
    job = service.store.get(id)
    assert job.status == "failed" and f"{ATTEMPTS} times" in job.error["message"]


def test_a_worker_is_gone_without_its_process_or_without_signs_of_life(service):
    clock = {"now": 1000.0}
    store = Store(service.store.url, now=lambda: clock["now"])
    claims = Claims(store)
    claims.register(WORKER, os.getpid(), "idle")
    submit(store)
    assert claims.claim(WORKER) is not None
    clock["now"] += LEASE - 1
    assert claims.recover(service.files, "restart") == []
    claims.beat(WORKER, "busy")
    clock["now"] += LEASE - 1
    assert claims.recover(service.files, "restart") == []
    clock["now"] += 2
    assert len(claims.recover(service.files, "restart")) == 1
    assert store.workers() == []
    store.close()


def test_a_worker_that_starts_has_longer_and_one_that_was_taken_for_gone_comes_back(service):
    clock = {"now": 1000.0}
    store = Store(service.store.url, now=lambda: clock["now"])
    claims = Claims(store)
    claims.register(WORKER, os.getpid(), "starting")
    clock["now"] += LEASE + 1
    claims.recover(service.files, "restart")
    assert [row["id"] for row in store.workers()] == [WORKER.id]
    clock["now"] += STARTING
    claims.recover(service.files, "restart")
    assert store.workers() == []
    claims.beat(WORKER, "idle")
    assert [(row["id"], row["state"]) for row in store.workers()] == [(WORKER.id, "idle")]
    store.close()


def test_pages_of_jobs(store):
    ids = submit(store, 5)
    jobs, more = store.list("video", after=None, limit=2, order="desc")
    assert [job.id for job in jobs] == ids[:2:-1] and more
    jobs, more = store.list("video", after=ids[3], limit=3, order="desc")
    assert [job.id for job in jobs] == ids[2::-1] and not more
    jobs, more = store.list("video", after=ids[0], limit=10, order="asc")
    assert [job.id for job in jobs] == ids[1:] and not more
    assert store.list("image", after=None, limit=2, order="asc") == ([], False)
    assert store.list("video", after="video_unknown", limit=2, order="asc") is None


def test_ids_are_long_and_new():
    ids = {new_id("video") for _ in range(1000)}
    assert len(ids) == 1000 and all(len(id) == len("video_") + 32 for id in ids)


def test_a_store_that_cannot_be_opened_says_so(tmp_path):
    with pytest.raises(ValueError, match="unable to open database file"):
        open_database(f"sqlite:///{tmp_path / 'none' / 'jobs.sqlite'}", durable=True)
    with pytest.raises(ValueError, match="can't be opened"):
        open_database("nothing://here", durable=True)
    with pytest.raises(ValueError, match="can't be opened") as caught:
        open_database("postgresql+nodriver://me:secret@host/jobs", durable=True)
    assert "secret" not in str(caught.value)
