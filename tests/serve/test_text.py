"""Text of a diffusion language model: the openai package's calls, what is streamed, what is never lost."""

import time

import openai
import pytest
import torch
from fastapi.testclient import TestClient

from sparse_dit.denoising import denoising_plan
from sparse_dit.serve.app import create_app
from sparse_dit.serve.claims import Claims
from sparse_dit.serve.command import Served, prepared
from sparse_dit.serve.options import ServeOptions
from sparse_dit.serve.text.canvas import Settled
from tests.helpers.documents import snippets
from tests.helpers.serve_cases import claimed, runner_of, work, working
from tests.helpers.text_site import listening, save_writer, text_service
from tests.helpers.tiny_canvases import bytes_writer
from tests.serve.test_documents import calls, sent

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPT = "Anna lives in the mill, and Otto in the tower by the river."
ASKED = {"model": "stub", "prompt": PROMPT, "max_tokens": 80, "seed": 5}
SMALL = {"num_inference_steps": 4, "block_length": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model, which has a plan beside it."""
    folder = save_writer(tmp_path_factory.mktemp("writer"))
    denoising_plan(bytes_writer(), "online", density=0.3).save(folder.parent / "thin.json")
    return folder


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    """The loaded model of all tests."""
    service, load = text_service(
        tmp_path_factory.mktemp("s"), model, [str(model.parent / "thin.json")]
    )
    service.store.close()
    return load("cpu")


@pytest.fixture
def service(tmp_path, model, request):
    """A server whose jobs wait until the test runs them."""
    options = getattr(request, "param", {})
    made, _ = text_service(tmp_path, model, [str(model.parent / "thin.json")], **options)
    yield made
    made.store.close()


@pytest.fixture
def address(service):
    """Where it listens."""
    with listening(service) as found:
        yield found


@pytest.fixture
def client(address):
    """The openai package's client."""
    with openai.OpenAI(api_key="key", base_url=f"{address}/v1", max_retries=0) as made:
        yield made


def streamed(client, **more):
    """The chunks of a stream."""
    options = {"include_usage": True, "include_canvas": True}
    given = {**ASKED, "extra_body": SMALL, "stream_options": options, **more}
    return [*client.completions.create(**given, stream=True)]


def text_of(chunks):
    """What they say."""
    return "".join(choice.text for chunk in chunks for choice in chunk.choices)


def test_a_text_whole_and_as_a_stream(service, engine, client):
    with working(service, engine):
        whole = client.completions.create(**ASKED, extra_body=SMALL)
        chunks = streamed(client)
        drawn, again, other = (
            text_of(streamed(client, temperature=1.0, top_p=0.9, seed=seed)) for seed in (3, 3, 4)
        )
        dense = client.completions.create(**ASKED, extra_body={**SMALL, "plan": "dense"})
        listed = client.get("/completions", cast_to=object)
    (choice,) = whole.choices
    assert choice.finish_reason in ("stop", "length") and whole.usage.prompt_tokens == len(PROMPT)
    assert whole.usage.total_tokens == len(PROMPT) + whole.usage.completion_tokens
    assert 0 < whole.model_extra["density"] < 1 and whole.model_extra["plan"] == "thin"
    assert text_of(chunks) == choice.text and drawn == again != other
    parts = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].text]
    assert len(parts) > 1, "blocks come as they are finished"
    *_, end, count = chunks
    assert end.choices[0].finish_reason == choice.finish_reason and count.usage == whole.usage
    canvases = [chunk.canvas for chunk in chunks if "canvas" in chunk.model_extra]
    assert [c["step"] for c in canvases] == [*range(1, whole.model_extra["steps"] + 1)]
    waiting = [sum(token is None for token in c["tokens"]) for c in canvases]
    assert {len(c["tokens"]) for c in canvases} == {80} and waiting == sorted(waiting, reverse=True)
    assert not listed["has_more"] and listed["data"][0]["id"] == dense.id
    ids = torch.tensor([engine.pipe.tokenizer(PROMPT).input_ids])
    stock = engine.pipe(
        input_ids=ids, gen_length=80, block_length=16, num_inference_steps=4, output_type="text"
    )
    assert dense.choices[0].text == stock.texts[0] and dense.model_extra["density"] is None


def test_it_ends_before_a_text_that_is_named(service, engine, client):
    with working(service, engine):
        whole = client.completions.create(**ASKED, extra_body=SMALL).choices[0].text
        stop = whole[30:33]
        cut = client.completions.create(**ASKED, extra_body=SMALL, stop=["never there", stop])
        chunks = streamed(client, stop=stop)
    assert cut.choices[0].text == text_of(chunks) == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == chunks[-2].choices[0].finish_reason == "stop"


def test_what_can_still_change_is_held_back():
    settled = Settled(bytes_writer().tokenizer, 1, ["END"])
    ids = settled.tokenizer("a ż EN").input_ids
    assert settled.take(ids[:3]) == "a" and settled.take(ids) == " ż "
    more = settled.tokenizer("a ż END of it").input_ids
    assert settled.take(more) == "" and (settled.text, settled.finish) == ("a ż ", "stop")
    ended = Settled(settled.tokenizer, 1, [])
    assert ended.take([*ids, 1, *ids], last=True) == "a ż EN" and ended.finish == "stop"
    cut = Settled(settled.tokenizer, 1, [])
    assert cut.take(ids[:3]) == "a " and cut.take(ids[:4]) == "ż"


def state(client, id, wanted):
    """What a job comes to."""
    until = time.monotonic() + 10
    while (found := client.get(f"/completions/{id}", cast_to=object))["status"] != wanted:
        assert time.monotonic() < until, found["status"]
        time.sleep(0.02)
    return found


def test_who_closes_a_stream_cancels_unless_there_is_a_key(service, engine, client):
    asked = {**ASKED, "max_tokens": 400, "extra_body": SMALL, "stream": True}
    options = {"stream_options": {"include_canvas": True}}
    key = {"extra_headers": {"Idempotency-Key": "one"}}
    with working(service, engine):
        alone = client.completions.create(**ASKED, extra_body=SMALL).choices
        left = client.completions.create(**asked, **options)
        id = next(iter(left)).id
        left.close()
        assert state(client, id, "cancelled")["choices"] == []
        after = client.completions.create(**ASKED, extra_body=SMALL).choices
        assert after == alone, "nothing is left of what was cut off"
        left = client.completions.create(**asked, **options, **key)
        id = next(iter(left)).id
        left.close()
        chunks = [*client.completions.create(**asked, **options, **key)]
    assert {chunk.id for chunk in chunks} == {id}
    done = state(client, id, "completed")
    assert text_of(chunks) == done["choices"][0]["text"] and done["attempt"] == 1


@pytest.mark.parametrize("lost", ["crash", "end"])
def test_a_stream_goes_on_when_its_worker_is_lost(service, engine, client, lost):
    with working(service, engine):
        told = text_of(streamed(client))
    stream = client.completions.create(
        **ASKED, extra_body=SMALL, stream=True, stream_options={"include_canvas": True}
    )
    while (job := claimed(service)) is None:
        time.sleep(0.01)
    steps = iter(range(12))
    ending = runner_of(service, engine, stopping=lambda: next(steps, None) is None)
    ending.run(job)  # as the server ends: back to its place
    if lost == "crash":
        Claims(service.store).crashed(claimed(service).worker, "the worker was killed")
    work(service, engine)
    assert text_of(stream) == told, "once, though it was written twice"
    assert service.store.list("text", after=None, limit=1, order="desc")[0][0].attempt > 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": " "}, "prompt: must be text that is not empty"),
        ({"prompt": []}, "prompt: must be a text, or a list of one text"),
        ({"prompt": [1, 2]}, "prompt: must be a text, or a list of one text"),
        ({"prompt": PROMPT * 9}, "must fit into the model's 512 tokens, got 640"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": 500}, "must fit into the model's 512 tokens, got 576"),
        ({"model": "gpt"}, "model must be stub, got 'gpt'"),
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        ({"echo": True}, "echo: Extra inputs are not permitted"),
        ({"n": 2}, "n: Input should be 1"),
        ({"stop": ""}, "stop: must be up to 4 texts of 1 to 256 characters each"),
        ({"stop": [*"abcde"]}, "stop: must be up to 4 texts"),
        ({"stop": [5]}, "stop: must be up to 4 texts"),
        (
            {"max_tokens": 300, "extra_body": {"block_length": 300}},
            "512 tokens, got 600 in whole blocks of 300",
        ),
        ({"extra_body": {"plan": ""}}, "plan must be one of thin, online"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream"),
        (
            {"extra_body": {"plan": "fast"}},
            "plan must be one of thin, online, sparsed, mage, dense",
        ),
        ({"extra_body": {"num_inference_steps": 900}}, "must be at most 200 steps, got 900"),
    ],
)
def test_bad_requests_are_told_at_once(service, change, words):
    with TestClient(create_app(service)) as http:
        client = openai.OpenAI(api_key="k", base_url="http://testserver/v1", http_client=http)
        with pytest.raises(openai.BadRequestError) as caught:
            client.with_options(max_retries=0).completions.create(**{**ASKED, **change})
    assert words in str(caught.value)
    assert sum(service.store.counts().values()) == 0


@pytest.mark.parametrize("service", [{"queue_size": 1}], indirect=True)
def test_a_full_queue_and_a_job_that_fails(service, engine, client):
    class Broken:
        plans = engine.plans
        pipe = engine.pipe

        def write(self, spec, plan, after_step):
            raise ValueError("it can't be written")

    waits = client.completions.create(**ASKED, stream=True)
    with pytest.raises(openai.RateLimitError, match="1 jobs are waiting already"):
        client.completions.create(**ASKED)
    with working(service, Broken()):
        with pytest.raises(openai.APIError, match="the job failed: it can't be written"):
            text_of(waits)
        with pytest.raises(openai.UnprocessableEntityError, match="it can't be written"):
            client.completions.create(**ASKED)


@pytest.mark.parametrize("plan", ["dense", "online", "mage"])
def test_a_model_that_says_nan_fails_the_job(service, engine, client, plan):
    (hidden,) = engine.pipe.model.model.norm.parameters()
    kept = hidden.detach().clone()
    with torch.no_grad(), working(service, engine):
        hidden[0] = torch.nan
        try:
            for more in ({}, {"temperature": 1.0}):
                with pytest.raises(openai.UnprocessableEntityError, match="numbers, got NaN"):
                    client.completions.create(**ASKED, **more, extra_body=SMALL | {"plan": plan})
        finally:
            hidden.copy_(kept)


def test_what_is_served_and_what_is_not(tmp_path, model, service):
    with TestClient(create_app(service)) as http:
        (listed,) = http.get("/v1/models").json()["data"]
        assert (listed["kind"], listed["context"], listed["id"]) == ("text", 512, "stub")
        assert [one["name"] for one in listed["plans"]] == ["thin", "online", "sparsed", "mage"]
        assert http.get("/v1/videos").status_code == 404
        given = {
            "content": rb'{"prompt": "a\ud800"}',
            "headers": {"content-type": "application/json"},
        }
        half = http.post("/v1/completions", **given)
        assert half.status_code == 400 and "half of a surrogate pair" in half.text
        wrong = http.post("/v1/completions", **given | {"content": b'{"prompt": x}'})
        told = wrong.json()["error"]
        assert wrong.status_code == 400 and told["param"] is None
        assert told["message"] == "the body must be JSON: Expecting value (character 11)"
        page = http.get("/").text
        assert "<form" in page and "//" not in page.replace("<!doctype", ""), (
            "nothing from elsewhere"
        )
    options = ServeOptions(store=f"sqlite:///{tmp_path}/x.sqlite", files=str(tmp_path / "f"))
    rule = model.parent / "mage.json"
    denoising_plan(bytes_writer(), "mage").save(rule)
    for changes, words in (
        ({"plans": (str(rule),)}, "mage is the name of a rule"),
        ({"plans": ("tiny-wan",)}, "the plan has components"),
        ({"plans": (), "settings": {"height": 32}}, "--height is for videos and images"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            prepared(Served(str(model), **changes), options)
    assert not (tmp_path / "x.sqlite").exists()


def test_every_call_of_the_page_is_answered(service, engine, address, capsys):
    client = TestClient(create_app(service))
    with working(service, engine):
        (python,) = snippets("docs/serving-text.md")
        text = python.text.replace("http://127.0.0.1:8000", address).replace("tiny-dlm", "stub")
        exec(compile(text, python.page, "exec"), {})
        (job,), _ = service.store.list("text", after=None, limit=1, order="desc")
        assert capsys.readouterr().out == job.result["text"] != ""
        shown = calls("docs/serving-text.md")
        id = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 8}).json()["id"]
        for words in shown:
            answer = sent(client, words, id)
            assert answer.status_code == 200, (words, answer.text)
    assert len(shown) > 3
