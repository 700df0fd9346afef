"""One job from its claim to its end: results, progress, errors, and every way to end early."""

from dataclasses import replace

import av
import pytest
import torch
from PIL import Image

from sparse_dit.serve.files import Files
from sparse_dit.serve.media import VARIANTS, preview_of, preview_steps
from sparse_dit.serve.plans import Plans, Served
from sparse_dit.serve.progress import Progress, Times
from sparse_dit.serve.running import explained
from tests.helpers.plan_cases import small
from tests.helpers.serve_cases import (
    MODEL,
    SPEC,
    StubEngine,
    claimed,
    runner_of,
    stub_card,
    stub_service,
    work,
)

PLANS = Plans([Served("fast", small(), None)])


@pytest.fixture
def service(tmp_path):
    """A server without HTTP, with one plan."""
    made = stub_service(tmp_path, stub_card(plans=PLANS))
    yield made
    made.store.close()


def submit(service, **changes):
    """Put a job into the queue; its id."""
    spec = SPEC.model_copy(update=changes)
    return service.store.submit(spec, MODEL, limit=100)[0].id


def test_a_job_leaves_its_files_and_what_came_out(service):
    id = submit(service, plan="fast", compare=True, num_frames=5)
    assert work(service, StubEngine(plans=PLANS, encode=True)) == [id]
    job = service.store.get(id)
    assert (job.status, job.progress, job.error) == ("completed", 100, None)
    assert job.result["psnr_db"] == pytest.approx(40, abs=0.5) and 0.9 < job.result["ssim"] < 1
    assert job.result["previews"] == [1, 2, 4, 5], "of both generations"
    assert job.result["density"] == PLANS["fast"].plan.density
    for name, kind in VARIANTS.values():
        file = service.files.file(job, name)
        assert file is not None and file.stat().st_size > 0, name
        if kind == "video/mp4":
            with av.open(str(file)) as video:
                assert sum(1 for _ in video.decode(video=0)) == 5
    assert service.files.size(job) == sum(
        file.stat().st_size for file in service.files.made(job).iterdir()
    )


def test_an_image_is_a_png(tmp_path):
    service = stub_service(tmp_path, stub_card("image"))
    id = submit(service, kind="image", num_frames=1)
    work(service, StubEngine(encode=True))
    file = service.files.file(service.store.get(id), "image.png")
    with Image.open(file) as picture:
        assert picture.size == (32, 16)
    service.store.close()


def test_the_store_knows_every_step(service):
    id, seen = submit(service, steps=4), []

    class Watching(StubEngine):
        def generate(self, spec, plan, after_step, image=None):
            def watched(latents):
                ended = after_step(latents)
                job = service.store.get(id)
                seen.append((job.progress, job.detail["step"], job.detail["phase"]))
                return ended

            return super().generate(spec, plan, watched, image)

    work(service, Watching())
    assert seen == [(25, 1, "dense"), (50, 2, "dense"), (75, 3, "dense"), (99, 4, "dense")]


class Meddling(StubEngine):
    """Does something after the first step, and counts steps."""

    def __init__(self, meddle):
        super().__init__()
        vars(self).update(meddle=meddle, steps=0)

    def generate(self, spec, plan, after_step, image=None):
        def meddling(latents):
            vars(self)["steps"] += 1
            if self.steps == 1:
                self.meddle()
            return after_step(latents)

        return super().generate(spec, plan, meddling, image)


def test_a_cancelled_job_ends_within_a_step(service):
    id = submit(service, steps=9)
    engine = Meddling(lambda: service.store.cancel(id))
    work(service, engine)
    job = service.store.get(id)
    assert (job.status, engine.steps) == ("cancelled", 1)
    assert list((service.files.folder / id).iterdir()) == [], "nothing half made is left"


def test_a_deleted_job_ends_within_a_step_and_leaves_nothing(service):
    id = submit(service, steps=9)
    engine = Meddling(lambda: service.delete(id, "video"))
    work(service, engine)
    assert engine.steps == 1 and service.store.get(id) is None
    assert not (service.files.folder / id).exists()


def test_a_worker_that_is_to_stop_gives_its_job_back(service):
    id = submit(service)
    engine = Meddling(lambda: None)
    runner = runner_of(service, engine, stopping=lambda: engine.steps == 1)
    runner.run(claimed(service))
    assert engine.steps == 1 and service.store.get(id).status == "queued"
    assert work(service) == [id]


def test_a_job_that_was_given_away_is_not_finished_twice(service):
    id = submit(service)
    early = claimed(service, "early")
    runner = runner_of(service)
    runner.claims.give_back(early)
    late = claimed(service, "late")
    runner.run(late)
    before = service.store.get(id)
    runner.run(early)
    assert service.store.get(id) == before and before.worker == "late"
    assert service.files.file(before, "video.mp4") is not None


@pytest.mark.parametrize(
    ("prompt", "code", "words"),
    [
        ("memory", "out_of_memory", "smaller size or fewer frames"),
        ("broken", "internal_error", "a stub that is broken"),
        ("wrong", "invalid_request", "can't do this"),
    ],
)
def test_an_error_is_kept_and_the_worker_goes_on(service, prompt, code, words):
    bad, good = submit(service, prompt=prompt), submit(service)
    assert work(service) == [bad, good]
    job = service.store.get(bad)
    assert job.status == "failed" and job.error["code"] == code and words in job.error["message"]
    assert service.store.get(good).status == "completed"


def test_memory_errors_are_told_as_such():
    errors = [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
    ]
    assert {explained(error)[0] for error in errors} == {"out_of_memory"}


def test_an_upload_is_decoded_by_the_worker_alone(service):
    seen = []

    class Looking(StubEngine):
        def generate(self, spec, plan, after_step, image=None):
            seen.append(image and image.size)
            return super().generate(spec, plan, after_step, image)

    good, large, broken = (submit(service, has_input=True) for _ in range(3))
    for id, size in ((good, (64, 48)), (large, (2000, 1000))):
        service.files.uploaded(id).parent.mkdir()
        Image.new("RGB", size).save(service.files.uploaded(id), "PNG")
    service.files.keep_upload(broken, b"\x89PNG\r\n\x1a\n and no more")
    work(service, Looking())
    assert seen == [(64, 48)] and service.store.get(good).status == "completed"
    assert "at most 1,048,576 pixels" in service.store.get(large).error["message"]
    assert "whole PNG, JPEG or WebP" in service.store.get(broken).error["message"]


def test_files_of_no_job_are_removed_when_they_are_old(tmp_path):
    files = Files(tmp_path)
    known, stray = (f"video_{digit * 32}" for digit in "ab")
    for name in (known, stray, "mine"):
        (tmp_path / name).mkdir()
    assert files.remove_strays({known}) == [], "one may be about to come"
    assert files.remove_strays({known}, age=0) == [stray]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", known]


def test_time_left_is_the_forecasts_or_that_of_an_equal_job_at_the_speed_of_the_latest_steps():
    now = [0.0]
    times, spec = Times(), SPEC.model_copy(update={"steps": 4})

    def begun(*forecast):
        return Progress(spec, times, forecast, clock=lambda: now[0])

    def lefts(progress, *seconds):
        left = []
        for one in seconds:
            now[0] += one
            progress.stepped()
            left.append(progress.seconds_left())
        return left

    first = begun(10.0)
    assert first.seconds_left() == 10.0 and begun().seconds_left() is None
    # the first step has the set-up in it; the others take twice as long as was forecast
    assert lefts(first, 8, 5, 5, 5) == [7.5, 10.0, 5.0, 0.0]
    assert lefts(begun(), 6, 2, 2) == [18.0, 4.0, 2.0], "by the steps alone"
    now[0] += 2
    assert first.finished() == 23 + 10 + 2
    times.keep(spec, [8.0, 13.0, 18.0, 23.0, 25.0])
    second = begun(10.0)
    assert second.seconds_left() == 25.0
    assert lefts(second, 4, 2.5) == [25 - 8, (25 - 13) / 2], "twice as fast"
    now[0] += 1
    assert second.seconds_left() == 5.0 and second.detail("dense")["seconds_left"] == 5.0
    other = Progress(spec.model_copy(update={"width": 64}), times)
    assert other.seconds_left() is None


def test_time_left_of_a_comparison_counts_its_dense_steps_as_slower():
    now = [0.0]
    spec = SPEC.model_copy(update={"steps": 2, "compare": True, "plan": "fast"})
    progress = Progress(spec, Times(), (4.0, 8.0), clock=lambda: now[0])
    left = []
    for seconds in (4, 4, 8):  # twice as slow as forecast
        now[0] += seconds
        progress.stepped()
        left.append(progress.seconds_left())
    assert left == [10.0, 16.0, 8.0]


@pytest.mark.parametrize("shape", [(1, 16, 3, 6, 8), (1, 4, 6, 8), (2, 1, 6, 8), (1, 2, 6, 8)])
def test_a_preview_shows_rows_and_columns(shape):
    latents = torch.randn(shape)
    latents[..., :4] += 5
    picture = preview_of(latents)
    assert picture.size == (256, 192) and picture.mode == "RGB"
    left, right = picture.resize((2, 1), Image.Resampling.BOX).get_flattened_data()
    assert sum(abs(a - b) for a, b in zip(left, right, strict=True)) > 100


def test_no_preview_where_rows_and_columns_are_not_known():
    assert preview_of(torch.randn(1, 48, 64)) is None
    assert preview_of(torch.full((1, 4, 6, 8), float("nan"))) is not None


def test_previews_are_few_and_never_of_the_last_step():
    assert preview_steps(1) == set() and preview_steps(2) == {1}
    assert preview_steps(50) == {10, 20, 30, 40}


def test_a_preview_is_found_while_its_job_is_published(service, monkeypatch):
    submit(service)
    job = claimed(service)
    with service.files.attempt(job) as folder:
        (folder / "preview-1.webp").write_bytes(b"a picture")
        assert service.files.read(job, "preview-1.webp") == b"a picture"
        making = service.files.making

        def published_at_once(job):
            monkeypatch.undo()
            service.files.publish(job, {})
            return making(job)

        monkeypatch.setattr(type(service.files), "making", lambda self, job: published_at_once(job))
        assert service.files.read(job, "preview-1.webp") == b"a picture"
    assert service.files.read(job, "preview-2.webp") is None


def test_an_attempt_begins_in_an_empty_folder(service):
    id = submit(service)
    job = claimed(service)
    service.files.keep_upload(id, b"kept")
    killed = service.files.making(job)
    killed.mkdir(parents=True)
    (killed / "half.mp4").write_bytes(b"0")
    with service.files.attempt(replace(job, attempt=2)) as folder:
        assert not killed.exists() and list(folder.iterdir()) == []
        with service.files.attempt(job):
            pass
        assert folder.exists(), "one that is late leaves the newer one alone"
    assert service.files.uploaded(id).read_bytes() == b"kept"
