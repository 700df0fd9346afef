"""DiffusionGemma's pipeline whole: bit-equal under a patch that is dense, sparse, restored, in threads."""

from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import diffusers
import pytest
import torch

import sparse_dit
from sparse_dit.denoising import denoising_plan
from sparse_dit.eval.denoising.frontier import DenoisingFrontier
from sparse_dit.eval.denoising.writing import Writing
from sparse_dit.integrations import attached, components, host_of
from tests.helpers.tiny_canvases import CANVAS, canvas_writer, diffusion_gemma

PROMPT = "Anna lives in the mill by the river, and Otto in the tower behind it. " * 8
SCHEDULERS = {
    "refined": diffusers.BlockRefinementScheduler,
    "ddim": diffusers.DiscreteDDIMScheduler,
    "entropy": diffusers.EntropyBoundScheduler,
}


@pytest.fixture(autouse=True)
def _():
    with mock.patch("torch.compiler.cudagraph_mark_step_begin"):  # it imports inductor
        yield


@pytest.fixture(scope="module")
def pipe():
    return canvas_writer()


def said(pipe, prompt=PROMPT, steps=4, **more):
    """The tokens that a pipeline writes, and what it thought of each in the last step of each canvas."""
    found = []

    def keep(_, step, timestep, tensors):
        found.append(tensors["logits"])
        return {}

    tokens = pipe(
        prompt=prompt, gen_length=2 * CANVAS, num_inference_steps=steps, output_type="seq",
        generator=torch.Generator().manual_seed(3), confidence_threshold=None, eos_early_stop=False,
        callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["logits"], **more,
    ).sequences  # fmt: skip
    return tokens, torch.cat(found)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_it_is_bit_equal_under_a_dense_patch_sparse_under_a_rule_and_restored(
    scheduler, cache, pipe
):
    pipe = canvas_writer(SCHEDULERS[scheduler](), pipe.model)
    stock = said(pipe, cache_implementation=cache)
    with sparse_dit.patch(pipe, "online"):  # at density 1
        assert same(said(pipe, cache_implementation=cache), stock)
    with sparse_dit.patch(pipe, "online", density=0.2) as handle:
        few = said(pipe, cache_implementation=cache)
        summary = handle.summary()
    assert summary.sparse_calls == 2 * 2 * 4 and summary.density < 0.8
    assert (few[1] - stock[1]).abs().max() > 1e-5
    assert same(said(pipe, cache_implementation=cache), stock)


@pytest.mark.parametrize(("corrector_steps", "counted"), [(0, 10), (1, 11), (2, 10)])
def test_what_is_left_of_the_steps_counts_those_of_a_corrector(corrector_steps, counted, pipe):
    pipe = canvas_writer(SCHEDULERS["ddim"](corrector_steps=corrector_steps), pipe.model)
    left = []

    def watch(call):
        if call.layer.endswith("decoder.layers.1.self_attn"):
            left.append(call.context.sigma)
        return call.stock()

    with attached(pipe, dict.fromkeys(components(pipe), watch)):
        said(pipe, steps=10)
    assert left == pytest.approx([1 - step / counted for step in range(10)] * 2)


def test_a_rule_of_density_1_says_that_it_is_dense(pipe):
    plan = denoising_plan(pipe, "online")
    assert plan.density == 1 and "beside a cache" in plan.forecast["note"]
    assert denoising_plan(pipe, "online", density=0.3).density == 0.3


@pytest.mark.parametrize("rule", ["online", "mage", "sparsed"])
def test_requests_in_threads_write_what_each_writes_alone(rule, pipe):
    prompts = [PROMPT, PROMPT[100:], "The river. " * 60]
    pipes = [canvas_writer(model=pipe.model) for _ in prompts]
    number = {"density" if rule == "online" else "keep": 0.2}
    with sparse_dit.patch(pipe, rule, **number) as handle:
        alone = [said(one, prompt) for one, prompt in zip(pipes, prompts, strict=True)]
        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(said, pipes, prompts))
    assert handle.summary().sparse_calls
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_a_prompt_of_tokens_gives_what_its_text_gives_step_by_step(pipe):
    ids = torch.tensor([pipe.processor(PROMPT + ":").input_ids])
    seen = []
    tokens, taken = host_of(pipe).write(
        pipe, ids, length=CANVAS + 3, block=CANVAS, steps=4, after_step=seen.append
    )
    whole = pipe(
        PROMPT, gen_length=2 * CANVAS, num_inference_steps=4, output_type="seq",
        eos_early_stop=False, generator=torch.Generator().manual_seed(0),
    ).sequences  # fmt: skip
    assert torch.equal(tokens, whole[0, : CANVAS + 3]) and taken.seconds > 0
    n = ids.shape[1]
    assert all(torch.equal(step[:n], ids[0]) for step in seen)
    assert [len(step) - n for step in seen] == [CANVAS] * 4 + [2 * CANVAS] * 4
    assert torch.equal(seen[-1][n : n + CANVAS], whole[0, :CANVAS]), "a canvas that is finished"

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host_of(pipe).write(pipe, ids, length=CANVAS, block=CANVAS, steps=4, after_step=stop)
    assert not pipe.model.model.encoder._forward_pre_hooks


def test_what_does_not_fit_is_told(pipe):
    small = canvas_writer(model=diffusion_gemma(vocab_size=259, max_position_embeddings=64))
    Writing(2 * CANVAS, CANVAS, 4).check(small, 32)
    with pytest.raises(ValueError, match="must fit into the model's 64 tokens, got 65"):
        Writing(CANVAS + 1, CANVAS, 4).check(small, 33)
    with pytest.raises(ValueError, match="block must be the model's canvas of 16 tokens, got 32"):
        Writing(CANVAS, 32, 4).check(pipe, 32)
    pipe.mask_token_id = None
    with pytest.raises(ValueError, match="models with a mask token, and DiffusionGemma"):
        DenoisingFrontier(texts={"a": "b"}, file="rows.json").prompts(pipe)
