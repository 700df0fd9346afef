"""Diffusion language models: bit-equal under a watcher, and each call knows its generation and step."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as T

from sparse_dit.integrations import attach, components
from sparse_dit.integrations.language.canvases import Canvases
from sparse_dit.layout import Segment, TokenLayout
from tests.helpers.tiny_canvases import (
    CANVAS,
    MASK,
    denoised,
    diffusion_gemma,
    llada2,
    masked_model,
    prompt,
    written,
)
from tests.helpers.tiny_language_models import ENCODER

ROOT = {
    "llama": lambda: masked_model(),
    "qwen3": lambda: masked_model(T.Qwen3ForCausalLM, T.Qwen3Config),
    "modernbert": lambda: T.ModernBertForMaskedLM(
        T.ModernBertConfig(**ENCODER, local_attention=16)
    ).eval(),
}


class Watch:
    """Keeps where each call of the first layer stood, and runs stock."""

    def __init__(self):
        self.seen, self.calls, self.first = [], 0, None

    def __call__(self, call):
        self.calls += 1
        self.first = self.first or call.layer
        if call.layer == self.first:
            self.seen.append(call.context)
        return call.stock()


def layout(*lengths):
    return TokenLayout(tuple(Segment.grid(1, 1, n) for n in lengths))


@pytest.mark.parametrize("name", ROOT)
def test_a_watcher_of_a_pipeline_changes_nothing_and_leaves_nothing(name):
    pipe, ids, watch = llada2(ROOT[name]()), prompt(20), Watch()
    stock = written(pipe, ids)
    attachment = attach(components(pipe)["model"], watch, pipe)
    assert torch.equal(written(pipe, ids), stock) and watch.calls
    attachment.detach()
    before = watch.calls
    assert torch.equal(written(pipe, ids), stock) and watch.calls == before


def test_a_call_knows_its_generation_its_step_and_what_is_masked():
    pipe, watch = llada2(), Watch()
    attach(components(pipe)["model"], watch, pipe)
    written(pipe, prompt(20))
    seen = watch.seen
    assert [c.run for c in seen] == [0] * 12 and [c.step for c in seen] == list(range(12))
    blocks = [layout(20, 12)] * 4 + [layout(20, 28)] * 4 + [layout(20, 44)] * 4
    assert [c.layout for c in seen] == blocks
    assert [c.active for c in seen] == [12] * 4 + [16] * 8
    assert [round(c.sigma, 3) for c in seen[4:]] == [1, 0.75, 0.5, 0.25] * 2
    assert {c.phase for c in seen} == {"any"} and {c.branch for c in seen} == {"any"}


def test_the_mask_token_is_learned_where_a_pipeline_is_given_it_with_the_call():
    pipe, watch = llada2(), Watch()
    pipe.mask_token_id = None
    attach(components(pipe)["model"], watch, pipe)
    written(pipe, prompt(20), mask_token_id=MASK)
    assert [c.sigma for c in watch.seen[4:8]] == [1, 0.75, 0.5, 0.25]


def test_generations_that_take_turns_are_told_apart():
    canvases = Canvases(MASK)
    prompts = [prompt(8, seed) for seed in range(3)]

    def stand(ids, left):
        return canvases._of_tokens(torch.cat([ids, torch.full((1, left), MASK), ids[:, left:]], 1))

    for step in range(4):
        for number, ids in enumerate(prompts):
            found = stand(ids, 8 - 2 * step)
            assert (found.run, found.step, found.sigma) == (number, step, 1 - step / 4)
    again = stand(prompts[1], 8)
    assert (again.run, again.step, again.sigma) == (3, 0, 1.0), "it begins again"
    assert stand(prompts[0], 0).run == 0, "and the others go on"


def test_a_request_that_comes_again_is_another_generation_to_its_end():
    pipe, watch = llada2(), Watch()
    attach(components(pipe)["model"], watch, pipe)
    for _ in range(3):
        written(pipe, prompt(20))
    steps = [(run, step) for run in range(3) for step in range(12)]
    assert [(c.run, c.step) for c in watch.seen] == steps


def test_equal_requests_that_take_turns_have_each_step_once():
    canvases, ids, seen = Canvases(MASK), prompt(8), []
    for step in range(4):
        canvas = torch.cat([ids, prompt(2 * step, 5), torch.full((1, 8 - 2 * step), MASK)], 1)
        seen += [canvases._of_tokens(canvas) for _ in range(2)]
    assert sorted((c.run, c.step) for c in seen) == [(r, s) for r in range(2) for s in range(4)]


def test_one_prompt_in_several_threads_is_as_many_generations():
    pipe, seen = llada2(), [[] for _ in range(3)]
    here, barrier = threading.local(), threading.Barrier(3)

    def watch(call):
        here.seen.append((call.context.run, call.context.step))
        return call.stock()

    def write(number):
        here.seen = seen[number]
        barrier.wait()
        draw = torch.Generator().manual_seed(number % 2)  # two of them write the same
        written(copy.copy(pipe), prompt(20), sampling_method="multinomial", generator=draw)

    attach(components(pipe)["model"], watch, pipe)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    assert {run for mine in seen for run, _ in mine} == {0, 1, 2}
    for mine in seen:
        assert len({run for run, _ in mine}) == 1
        assert [step for _, step in mine] == [s for s in range(12) for _ in range(len(mine) // 12)]


def test_an_unconditional_half_is_another_generation():
    canvases, ids = Canvases(MASK), prompt(12)
    nothing = torch.full_like(ids, MASK)
    for step in range(3):
        canvas = torch.cat([prompt(step, 5), torch.full((1, 8 - step), MASK)], 1)
        assert canvases._of_tokens(torch.cat([ids, canvas], 1)).run == 0
        half = canvases._of_tokens(torch.cat([nothing, canvas], 1))
        assert (half.run, half.step) == (1, step)
    canvas = torch.full((1, 8), MASK)
    both = torch.cat([torch.cat([ids, canvas], 1), torch.cat([nothing, canvas], 1)])
    found = canvases._of_tokens(both)
    assert found.run == 2 and found.layout == layout(12, 8), "both in one batch"


@pytest.mark.parametrize("ids", [torch.full((1, 8), MASK), prompt(8)], ids=["all", "none"])
def test_a_sequence_of_masks_alone_and_one_without_any(ids):
    found = Canvases(MASK)._of_tokens(ids)
    everything = bool((ids == MASK).all())
    assert found.layout == layout(8) and found.sigma == float(everything)
    assert found.active == (8 if everything else 0)


def test_two_threads_know_their_own_generation():
    pipe, ids = llada2(), [prompt(20 + 16 * n, n) for n in range(4)]
    stock = [written(pipe, one) for one in ids]
    seen = []

    def watch(call):
        seen.append((call.context.run, call.context.layout.seq_len == call.k.shape[1]))
        return call.stock()

    attach(components(pipe)["model"], watch, pipe)
    with ThreadPoolExecutor(4) as pool:
        out = list(pool.map(lambda one: written(copy.copy(pipe), one), ids))
    assert all(torch.equal(a, b) for a, b in zip(out, stock, strict=True))
    assert all(fits for _, fits in seen) and {run for run, _ in seen} == {0, 1, 2, 3}


def test_beside_a_cache_the_cache_tells_the_generation():
    model, ids = diffusion_gemma(), prompt(20)
    stock = denoised(model, ids)
    seen = []

    def watch(call):
        if "decoder.layers.1" in call.layer:
            seen.append(call.context)
            assert call.context.layout.seq_len == call.k.shape[1]
        return call.stock()

    attachment = attach(model, watch)
    assert torch.equal(denoised(model, ids), stock) and torch.equal(denoised(model, ids), stock)
    attachment.detach()
    assert torch.equal(denoised(model, ids), stock)
    assert [c.run for c in seen] == [0] * 6 + [1] * 6
    assert [round(c.sigma, 2) for c in seen[:6]] == [1, 0.67, 0.33] * 2
    assert [c.layout for c in seen[::3]][:2] == [layout(20, CANVAS), layout(20 + CANVAS, CANVAS)]


def test_copies_and_pickles_begin_anew():
    canvases = Canvases(MASK)
    canvases._of_tokens(prompt(8))
    twin = pickle.loads(pickle.dumps(canvases))
    assert twin.mask_token == MASK and twin.stand(8, 8) is None and not twin._known
