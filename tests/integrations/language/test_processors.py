"""From pictures and clips to answers: processors of transformers, tiny VLMs, exact and under a plan."""

import os
import subprocess
import sys

import pytest
import torch
import transformers
from PIL import Image

import sparse_dit
from sparse_dit.attend_call import attend_call
from sparse_dit.estimate import Budget, ByQuery, Grid, OwnPart, VerticalSlash, estimated_index
from sparse_dit.integrations import attach
from sparse_dit.patterns import Pattern
from tests.helpers.documents import ROOT
from tests.helpers.language_plans import plan_for
from tests.helpers.tiny_processors import drawn, with_processor

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ["qwen2_5_vl", "qwen3_vl"]
HOW = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
SHAPE = ByQuery(
    text=VerticalSlash(sampled=16, budget=Budget(beta=0.2, least=96)),
    image=OwnPart(),
    video=Grid(sampled=16, budget=Budget(beta=0.2, least=96)),
)
SEEN, MOVING = (
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|vision_start|><|video_pad|><|vision_end|>",
)


def asked(name, processor, seed=0):
    """A prompt with two pictures and a clip."""
    moving = "<|video_pad|>" if name == "qwen3_vl" else MOVING
    text = (
        f"Two pictures: {SEEN} and {SEEN}. Now a clip: {moving} " + "What is to be seen in it? " * 4
    )
    pictures = [
        Image.fromarray(drawn(1, 40, 64, seed)[0]),
        Image.fromarray(drawn(1, 48, 48, seed + 1)[0]),
    ]
    found = processor(
        text=[text], images=pictures, videos=[drawn(12, 48, 72, seed + 2)], return_tensors="pt"
    )
    found.pop("video_metadata", None)
    return found


def places_of(model, inputs):
    found = []

    def watch(call):
        found.append(call.context.modalities)
        return call.stock()

    attachment = attach(model, watch)
    model.generate(**inputs, **HOW)
    attachment.detach()
    return found[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_processors_tokens_are_placed(name):
    model, processor = with_processor(name)
    inputs = asked(name, processor)
    (where,) = places_of(model, inputs)
    ids = inputs["input_ids"][0]
    assert where.unknown is None and where.length >= len(ids) > 300
    kinds = torch.zeros(len(ids), dtype=torch.long)
    kinds[ids == model.config.image_token_id] = 1
    kinds[ids == model.config.video_token_id] = 2
    assert torch.equal(where.kinds()[: len(ids)], kinds)
    pictures = [part.grid for part in where.media if part.kind == "image"]
    assert pictures == [(1, 5, 8), (1, 6, 6)]
    clip = [part for part in where.media if part.kind == "video"]
    if name == "qwen2_5_vl":
        assert [part.grid for part in clip] == [(6, 6, 9)]
    else:  # "<0.2 seconds>" and so on between frames
        assert [part.grid for part in clip] == [(1, 6, 9)] * 6 and len({p.clip for p in clip}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_answers_exact_and_under_a_plan(name):
    model, processor = with_processor(name)
    inputs = asked(name, processor)
    stock = model.generate(**inputs, **HOW)
    said = processor.batch_decode(stock[:, inputs["input_ids"].shape[1] :])
    with sparse_dit.patch(model, "exact") as handle:
        assert torch.equal(model.generate(**inputs, **HOW), stock)
    assert len(said[0]) >= 4
    plan, far = plan_for(model, Pattern(SHAPE)), []

    def by_reference(call):
        if call.q.shape[1] == 1:
            return call.stock()
        q, k = call.q.transpose(1, 2), call.k.transpose(1, 2)
        (where,) = call.context.modalities
        index = estimated_index(q, k, [SHAPE] * 4, scale=call.scale, modalities=where)
        far.append(index.density)
        return attend_call(call, index, "reference")[0]

    more = {"return_dict_in_generate": True, "output_logits": True}
    attachment = attach(model, by_reference)
    want = model.generate(**inputs, **HOW, **more)
    attachment.detach()
    with sparse_dit.patch(model, plan) as handle:
        got = model.generate(**inputs, **HOW, **more)
    summary = handle.summary()
    assert summary.sparse_calls == 2 and summary.notes == () and max(far) < 0.7
    assert torch.equal(got.sequences, want.sequences)
    for one, other in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.generate(**inputs, **HOW), stock), "stock again, bit for bit"


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_from_the_processor(name):
    model, processor = with_processor(name)
    text = [f"{SEEN} What is it?", f"Look at {SEEN} and at {SEEN}. Which of both is larger?"]
    pictures = [Image.fromarray(drawn(1, side, 64, side)[0]) for side in (64, 40, 48)]
    inputs = processor(
        text=text, images=[pictures[:1], pictures[1:]], padding=True, return_tensors="pt"
    )
    stock = model.generate(**inputs, **HOW)
    assert [[part.grid for part in item.media] for item in places_of(model, inputs)] == [
        [(1, 8, 8)], [(1, 5, 8), (1, 6, 8)],
    ]  # fmt: skip
    with sparse_dit.patch(model, plan_for(model, Pattern(SHAPE))) as handle:
        model.generate(**inputs, **HOW)
    assert (
        handle.summary().sparse_calls + sum(handle.summary().stages[0].dense_calls.values())
        == 2 * 2
    ), "an item at a time"
    assert torch.equal(model.generate(**inputs, **HOW), stock)


IN_A_FRESH_PROCESS = """
import torch, transformers
import sparse_dit
from tests.integrations.language import test_processors as it
transformers.logging.set_verbosity_error()
for name in it.NAMES:
    model, processor = it.with_processor(name)
    inputs = it.asked(name, processor)
    with sparse_dit.patch(model, it.plan_for(model, it.Pattern(it.SHAPE))) as handle:
        first = model.generate(**inputs, **it.HOW)  # nothing of it ran stock before
        again = model.generate(**inputs, **it.HOW)
    assert torch.equal(first, again) and handle.summary().sparse_calls == 4, handle.summary()
    stock = model.generate(**inputs, **it.HOW)
    with sparse_dit.patch(model, "exact"):
        assert torch.equal(model.generate(**inputs, **it.HOW), stock)
    assert torch.equal(model.generate(**inputs, **it.HOW), stock)
"""


def test_the_first_thing_a_process_does():
    code = [sys.executable, "-W", "ignore", "-c", IN_A_FRESH_PROCESS]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
