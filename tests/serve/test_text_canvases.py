"""Text of DiffusionGemma's pipeline at /v1/completions, whole and as a stream."""

from unittest import mock

import openai
import pytest
import torch

from sparse_dit.inputs import is_denoiser, load_denoiser
from tests.helpers.serve_cases import working
from tests.helpers.text_site import listening, save_canvas_writer, text_service
from tests.helpers.tiny_canvases import CANVAS

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPT = "Anna lives in the mill, and Otto in the tower by the river. " * 7
ASKED = {"model": "stub", "prompt": PROMPT, "max_tokens": 40, "seed": 5}
SMALL = {"num_inference_steps": 4, "plan": "mage"}


@pytest.fixture(autouse=True)
def _():
    with mock.patch("torch.compiler.cudagraph_mark_step_begin"):  # it imports inductor
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_canvas_writer(tmp_path_factory.mktemp("canvases"))


@pytest.fixture
def served(tmp_path, model):
    """A server, the openai package's client of it, and what loads the model."""
    service, load = text_service(tmp_path, model)
    with (
        listening(service) as address,
        openai.OpenAI(api_key="key", base_url=f"{address}/v1", max_retries=0) as client,
    ):
        yield service, client, load
    service.store.close()


def test_a_text_whole_and_as_a_stream(served):
    service, client, load = served
    engine = load("cpu")
    options = {"include_usage": True, "include_canvas": True}
    with working(service, engine):
        whole = client.completions.create(**ASKED, extra_body=SMALL)
        more = {"extra_body": SMALL, "stream": True, "stream_options": options}
        chunks = [*client.completions.create(**ASKED, **more)]
        dense = client.completions.create(**ASKED, extra_body=SMALL | {"plan": "dense"})
    (choice,) = whole.choices
    assert whole.usage.prompt_tokens == len(PROMPT) and 0 < whole.model_extra["density"] < 1
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == choice.text
    canvases = [chunk.canvas["tokens"] for chunk in chunks if "canvas" in chunk.model_extra]
    assert len(canvases) == whole.model_extra["steps"]
    filled = [sum(token is not None for token in tokens) for tokens in canvases]
    assert filled == sorted(filled) and {*filled} <= {CANVAS, 2 * CANVAS, 40}
    assert dense.model_extra["density"] is None
    template = engine.pipe.processor.chat_template
    assert template == "{{ messages[0].content }}:", "which isn't put around what is asked"
    with mock.patch.object(engine.pipe.processor, "chat_template", "{{ messages[0].content }}"):
        said = engine.pipe(
            PROMPT, gen_length=40, num_inference_steps=4, generator=torch.Generator().manual_seed(5)
        )
    assert said.texts[0].startswith(dense.choices[0].text)


def test_what_it_cannot_do_is_told_before_it_waits(served):
    service, client, _ = served
    assert service.card.context == 512
    for more, why in (
        ({"extra_body": {"block_length": 32}}, "block_length must be the model's canvas of 16"),
        ({"top_p": 0.9}, "top_p must be left out"),
        ({"max_tokens": 4096}, "must fit into the model's"),
    ):
        with pytest.raises(openai.BadRequestError, match=why):
            client.completions.create(**(ASKED | more))


def test_a_folder_of_the_model_alone_is_served_too(model, tmp_path):
    pipe = load_denoiser(str(model), "cpu", None)
    pipe.model.save_pretrained(tmp_path / "alone")
    pipe.tokenizer.save_pretrained(tmp_path / "alone")
    assert is_denoiser(str(model)) and is_denoiser(str(tmp_path / "alone"))
    again = load_denoiser(str(tmp_path / "alone"), "cpu", None)
    assert type(again) is type(pipe) and again.mask_token_id is None
    assert all(
        torch.equal(a, b)
        for a, b in zip(pipe.model.parameters(), again.model.parameters(), strict=True)
    )
