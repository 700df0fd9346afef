"""Rules for diffusion language models: what is computed, kept, taken again, and what is refused."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import sparse_dit
from sparse_dit.attention import sparse_attention
from sparse_dit.call import AttentionCall, StepContext
from sparse_dit.cut import slice_entry
from sparse_dit.denoising import DENOISING, denoising_plan
from sparse_dit.estimate.blocks import blocks_of
from sparse_dit.estimate.blockwise import blockwise_entries, chosen_blocks
from sparse_dit.index import index_of
from sparse_dit.integrations import components, heads_of
from sparse_dit.layout import Segment, TokenLayout
from sparse_dit.patterns import Budget, Dense, Mass, Pattern, Pooled
from sparse_dit.plan import ComponentPlan, HeadChoice, Plan, Stage, config_hash
from sparse_dit.runtime import Runtime
from tests.helpers.language_plans import SLASH
from tests.helpers.language_plans import plan_for as causal_plan
from tests.helpers.tiny_canvases import (
    MASK,
    denoised,
    diffusion_gemma,
    llada2,
    masked_model,
    prompt,
    written,
)
from tests.helpers.tiny_language_models import text
from tests.helpers.tiny_pipelines import wan

ROW = (1, 1, 16)
LAYOUT = TokenLayout((Segment.grid(1, 1, 70), Segment.grid(1, 1, 30)))


def plan_for(pipe, pattern, named=""):
    model = components(pipe)["model"]
    heads = {layer: sizes for layer, sizes in heads_of(model).items() if named in layer}
    layers = {layer: ((HeadChoice(pattern),) * count,) for layer, (count, _) in heads.items()}
    part = ComponentPlan(
        type(model).__name__, config_hash(model.config), heads, LAYOUT, (Stage(1.0, 0.0),), layers
    )
    return Plan("", {"model": part}, 0.5)


@torch.no_grad()
def said(pipe, ids):
    """What a model says of masked tokens in the second step of a generation."""
    masks = torch.full((1, 36), MASK)
    pipe.model(torch.cat([ids, masks], 1))
    answer = torch.cat([prompt(12, 9), masks[:, 12:]], 1)
    return pipe.model(torch.cat([ids, answer], 1)).logits[0, -24:]


def test_isolated_selection_keeps_its_share_of_each_segment():
    pattern = Pattern(Mass(Budget(beta=0.4, least=16), isolated=True), tile=ROW)
    blocks = blocks_of(pattern, LAYOUT)
    assert blocks.segments.tolist() == [0] * 5 + [1] * 2
    p = torch.rand(300, 7, 7, generator=torch.Generator().manual_seed(0))  # shares are of many rows
    p[..., 5:] += 10  # all would be of the second segment
    chosen = chosen_blocks(p, pattern.shape, blocks)
    tokens = (chosen * blocks.sizes).sum(-1).float()
    of_prompt = (chosen[..., :5] * blocks.sizes[:5]).sum(-1).float()
    assert 0.25 < of_prompt.mean() / 70 < 0.5 and (of_prompt > 0).all()
    assert ((tokens - of_prompt) > 0).all()
    assert not chosen_blocks(p, Mass(Budget(beta=0.3, least=16)), blocks)[..., :5].any()


def test_the_canvas_sees_everything_and_is_seen_by_all():
    q, k = torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 16)
    pattern = Pattern(Pooled(Budget(beta=0.1, least=1), canvas=True), tile=ROW)
    (one, _) = blockwise_entries(
        q, k, dict.fromkeys(range(2), pattern), LAYOUT, 0.25, active=14
    ).values()
    v = torch.eye(100).expand(1, 2, 100, 100)
    out = sparse_attention(q, k, v, index_of({0: one.entry, 1: one.entry}), backend="reference")[
        0, 0
    ]
    assert (out[-14:] > 0).all() and (out[:, -14:] > 0).all() and (out[:70, :70] == 0).any()


def test_a_canvas_beside_a_cache_sees_all_of_itself_and_some_of_the_cache():
    q, k = torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 16)
    pattern = Pattern(Pooled(Budget(beta=0.1, least=1), canvas=True), tile=ROW)
    one = blockwise_entries(q[:, :, 70:], k, {0: pattern}, LAYOUT, 0.25, active=30)[0].entry
    q_eye = torch.eye(100).expand(1, 1, 100, 100)
    index = index_of({0: slice_entry(one, 70, 100)})
    out = sparse_attention(q[:, :1, 70:], k[:, :1], q_eye, index, backend="reference")[0, 0]
    assert (out[:, 70:] > 0).all() and (out[:, :70] == 0).any(1).all()


def test_queries_beside_a_cache_choose_as_the_last_rows_of_all():
    q, k = torch.randn(1, 2, 100, 16), torch.randn(1, 1, 100, 16)
    pattern = Pattern(Pooled(Budget(beta=0.3, least=16)), tile=ROW)
    whole = blockwise_entries(q, k, {0: pattern}, LAYOUT, 0.25)[0].entry
    last = blockwise_entries(q[:, :, 70:], k, {0: pattern}, LAYOUT, 0.25)[0].entry
    first = int((whole.q_offsets < 70).sum())
    assert torch.equal(
        whole.runs[int(whole.run_offsets[first]) :], last.runs[int(last.run_offsets[first]) :]
    )
    with pytest.raises(ValueError, match="need blocks that begin with the first of them"):
        blockwise_entries(q[:, :, 75:], k, {0: pattern}, LAYOUT, 0.25)


@pytest.mark.parametrize("name", DENOISING)
def test_every_rule_runs_sparse_and_everything_kept_is_dense(name):
    pipe, ids = llada2(), prompt(300)
    stock = said(pipe, ids)
    number = DENOISING[name].option[0]
    with sparse_dit.patch(pipe, name, **{number: 0.05}) as handle:
        few, summary = said(pipe, ids), handle.summary()
    assert summary.sparse_calls and 0 < summary.density < 0.75
    assert (few - stock).abs().max() > 1e-4
    with sparse_dit.patch(pipe, name, **{number: 1.0}):
        everything = said(pipe, ids)
    if name == "online":  # what isn't denoised is of the step before
        assert (everything - stock).abs().max() < (few - stock).abs().max()
    else:
        torch.testing.assert_close(everything, stock, rtol=1e-4, atol=1e-5)
    assert torch.equal(said(pipe, ids), stock), "and nothing is left"


def call_of(step, sigma, run=0, seed=0, n=100, **fields):
    drawn = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, n, 2, 16, generator=drawn) for _ in range(3))
    layout = TokenLayout((Segment.grid(1, 1, n - 30), Segment.grid(1, 1, 30)))
    context = StepContext(layout, sigma, run=run, step=step, active=30)
    made = AttentionCall("a", q, k, v, None, None, None, context, None, lambda: stock(q, k, v))
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def stock(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def runtime_of(pattern):
    heads = (HeadChoice(pattern),) * 2
    part = ComponentPlan("M", "0" * 64, {"a": (2, 16)}, LAYOUT, (Stage(1.0, 0.0),), {"a": (heads,)})
    return Runtime("model", part, "auto")


def test_sparsed_is_dense_first_and_keeps_what_its_last_dense_step_found():
    runtime = runtime_of(DENOISING["sparsed"].pattern(0.3))
    dense = []
    for step, sigma in enumerate([1.0, 0.9, 0.8, 0.6]):
        call = call_of(step, sigma, seed=step)
        dense.append(torch.allclose(runtime(call), call.stock(), atol=1e-4))
    assert dense[:2] == [True, True]
    assert runtime._estimates is not None and set(
        runtime._estimates._runs[0].kept["a", "any", None].steps.values()
    ) == {1}


def test_mage_chooses_anew_where_all_of_a_block_is_masked():
    runtime = runtime_of(DENOISING["mage"].pattern(0.1))
    found = []
    for step, sigma in enumerate([1.0, 0.5, 1.0, 0.5]):
        runtime(call_of(step, sigma, seed=step))
        assert runtime._estimates is not None
        found.append(max(runtime._estimates._runs[0].kept["a", "any", None].steps.values()))
    assert found == [0, 0, 2, 2]


def test_what_isnt_denoised_is_taken_again_and_what_is_sees_everything():
    runtime = runtime_of(Pattern(Dense(), settled_every=3))
    first = call_of(0, 1.0)
    assert torch.equal(runtime(first), first.stock())
    for step in (1, 2):
        call = call_of(step, 0.5, seed=step)
        out = runtime(call)
        assert torch.equal(out[:, :38], first.stock()[:, :38]), "and not the 32 before the canvas"
        torch.testing.assert_close(out[:, 38:], call.stock()[:, 38:], rtol=1e-4, atol=1e-5)
    call = call_of(3, 0.25, seed=3)
    assert torch.equal(runtime(call), call.stock()), "after three steps all is computed"
    other = call_of(4, 1.0, run=1, seed=4)
    assert torch.equal(runtime(other), other.stock()), "and of another generation nothing is taken"
    back = runtime(call_of(4, 0.2, seed=5))
    assert torch.equal(back[:, :38], call.stock()[:, :38]), "generations may take turns"
    one = 38 * 2 * 16 * 4
    assert runtime._settled is not None and runtime._settled.num_bytes == 2 * one
    for step in range(12):
        runtime(call_of(step, 1.0, run=2))
    assert runtime._settled.num_bytes == one, "those that have ended are dropped"
    runtime.forget()
    assert runtime._settled.num_bytes == 0
    changed = call_of(5, 0.1, seed=6, n=100)
    assert torch.equal(runtime(changed), changed.stock())


def test_what_was_written_since_is_computed_until_it_is_a_quarter_of_all():
    runtime = runtime_of(Pattern(Dense(), settled_every=64))
    first = call_of(0, 1.0, n=400)
    assert torch.equal(runtime(first), first.stock())
    for step, n in enumerate((400, 430, 440), 1):  # blocks that follow
        call = call_of(step, 1.0, seed=step, n=n)
        out = runtime(call)
        assert torch.equal(out[:, :338], first.stock()[:, :338])
        torch.testing.assert_close(out[:, 338:], call.stock()[:, 338:], rtol=1e-4, atol=1e-5)
    for step, n in enumerate((460, 300), 4):  # too many, and fewer than were kept
        call = call_of(step, 1.0, seed=step, n=n)
        assert torch.equal(runtime(call), call.stock())
    short = call_of(6, 1.0, n=62)
    assert torch.equal(runtime(short), short.stock()), "all of it is computed in every step"


@pytest.mark.parametrize("name", DENOISING)
def test_generations_that_run_in_threads_write_what_each_writes_alone(name):
    pipe, prompts = llada2(), [prompt(300 + 16 * n, n) for n in range(3)]
    with sparse_dit.patch(pipe, name):
        alone = [written(pipe, ids, length=16) for ids in prompts]
        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(lambda ids: written(copy.copy(pipe), ids, length=16), prompts))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_items_of_a_batch_are_found_apart_and_padding_is_honoured():
    pipe, one = llada2(), prompt(200)
    other = prompt(230, 1)
    both = torch.cat([torch.cat([torch.zeros(1, 30, dtype=torch.long), one], 1), other])
    mask = (both != 0).long()
    plan = plan_for(pipe, Pattern(Mass(Budget(beta=0.3, least=16)), tile=ROW))
    with sparse_dit.patch(pipe, plan):
        together = written(pipe, both, attention_mask=mask, length=10, block=24)
        alone = written(pipe, other, length=10, block=24)
    assert torch.equal(together[1:], alone)


def test_a_decoder_beside_a_cache_runs_sparse():
    model, ids = diffusion_gemma(), prompt(84)
    dense = denoised(model, ids, 1)
    few = Budget(beta=0.3, least=1)
    shapes = [Mass(few, dense_above=0.999), Pooled(few, refresh=None), Mass(Budget(beta=1.0))]
    for shape in shapes:
        with sparse_dit.patch(
            model, plan_for(model, Pattern(shape, tile=ROW), "decoder")
        ) as handle:
            out = denoised(model, ids, 1)
        assert handle.summary().sparse_calls == (6 if shape.keep is few else 2)
    assert torch.equal(out, dense), "where everything is kept"
    assert set(denoising_plan(model, "mage").components["model"].layers) == {
        layer for layer in heads_of(model) if "decoder" in layer
    }


@pytest.mark.parametrize("name", DENOISING)
def test_interrupted_generations_leave_nothing_behind(name):
    pipe, ids, number = llada2(), prompt(300), 0

    def stop(*_):
        nonlocal number
        number += 1
        if number == 3:
            raise KeyboardInterrupt
        return {}

    with sparse_dit.patch(pipe, name):
        want = written(pipe, ids)
        with pytest.raises(KeyboardInterrupt):
            written(pipe, ids, callback_on_step_end=stop)
        assert torch.equal(written(pipe, ids), want)


@pytest.mark.parametrize("name", DENOISING)
@pytest.mark.parametrize(
    ("tokens", "how"),
    [
        (0, {"length": 48}),
        (1, {"length": 48}),
        (300, {"length": 12, "block": 16}),
        (100, {"length": 16, "block": 256}),
        (300, {"length": 3, "block": 1}),
        (300, {"length": 64, "num_inference_steps": 1}),
    ],
    ids=["empty", "one token", "one block", "a block of all", "blocks of one", "one step a block"],
)
def test_the_least_there_is_is_written_and_leaves_nothing(name, tokens, how):
    pipe, ids = llada2(), prompt(tokens)
    stock = written(pipe, ids, **how)
    with sparse_dit.patch(pipe, name) as handle:
        found, summary = written(pipe, ids, **how), handle.summary()
    assert found.shape == stock.shape and summary.density is not None
    if how.get("num_inference_steps") == 1:
        assert (summary.density == 1) == (name != "online"), "a block has no other step"
    assert torch.equal(written(pipe, ids, **how), stock)


@torch.no_grad()
def test_a_plan_for_causal_order_leaves_a_model_that_sees_both_ways_dense():
    pipe, ids = llada2(), prompt(300)
    stock = said(pipe, ids)
    for stage in (Stage(1.0, 0.0), Stage(1.0, 0.0, phase="prefill")):
        plan = causal_plan(pipe.model, SLASH, stages=(stage,))
        with sparse_dit.patch(pipe, plan) as handle:
            assert torch.equal(said(pipe, ids), stock) and handle.summary().density == 1
        reasons = {ran.dense_because for ran in handle.ran["model"]}
        told = "sees both ways" if stage.phase == "any" else "not in the plan"
        assert all(told in str(reason) for reason in reasons)


def test_bad_input_is_told():
    pipe = llada2()
    with pytest.raises(ValueError, match="keep must be a number from 0 to 1, got 2"):
        sparse_dit.patch(pipe, "sparsed", keep=2)
    with pytest.raises(ValueError, match="'mage' takes keep, not density"):
        sparse_dit.patch(pipe, "mage", density=0.3)
    with pytest.raises(
        NotImplementedError, match="'sparsed' is for diffusion models, and WanPipeline"
    ):
        sparse_dit.patch(wan()[0], "sparsed")
    with pytest.raises(NotImplementedError, match="'mage' is for diffusion models, and LlamaFor"):
        sparse_dit.patch(text("llama")[0], "mage")
    model = masked_model()
    with pytest.raises(NotImplementedError, match="mask token is"):
        sparse_dit.patch(model, "online")
    model.config.mask_token_id = MASK
    with torch.no_grad(), sparse_dit.patch(model, "online") as handle:
        model(input_ids=torch.cat([prompt(100), torch.full((1, 20), MASK)], 1))
        model(inputs_embeds=torch.randn(1, 100, 64))
    ran = {ran.dense_because for ran in handle.ran["model"]}
    assert "the forward's arguments don't tell the token grid" in ran
    with pytest.raises(ValueError, match="isolated and adaptive"):
        Mass(isolated=True, adaptive=True)
    with pytest.raises(ValueError, match="every and settled_every"):
        Pattern(Dense(), every=2, settled_every=2)


def test_values_that_arent_finite_leave_a_head_dense():
    runtime = runtime_of(DENOISING["mage"].pattern(0.1))
    call = call_of(0, 1.0)
    call.q[0, 3, 1] = torch.nan
    runtime(call)
    assert any("finite" in note for note in runtime.notes)


def test_a_plan_of_a_rule_survives_its_file(tmp_path):
    plan = denoising_plan(llada2(), "online", density=0.4)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
