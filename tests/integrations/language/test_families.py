"""Every family: bit-equal to stock while a watcher is attached and again after removal, exact to rounding."""

import copy
import warnings

import pytest
import torch
import transformers

import sparse_dit
from sparse_dit.integrations import attach, heads_of
from sparse_dit.integrations.language.tested import LANGUAGE_MODELS, VLMS
from tests.helpers.tiny_language_models import TEXT_MODELS, VISION_MODELS, logits, text, vision

transformers.logging.set_verbosity_error()
CASES = [*((text, name) for name in TEXT_MODELS), *((vision, name) for name in VISION_MODELS)]
STOCK = {"gemma2"}  # softcap: what only the stock function computes
# every token sees every token, or one image prefix is all there is
UNMASKED = {"paligemma", "llama both ways", "bert", "roberta", "eurobert"}


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].__name__}-{case[1]}".replace(" ", "-"))
def made(request):
    make, name = request.param
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return name, *make(name)


def test_the_classes_that_are_listed_are_those_that_are_tested(recwarn):
    assert set(LANGUAGE_MODELS) == {kind.__name__ for kind, _ in TEXT_MODELS.values()}
    assert set(VLMS) == {type(vision(name)[0]).__name__ for name in VISION_MODELS}


def test_a_watcher_changes_nothing_and_leaves_nothing(made):
    _, model, inputs = made
    before = {path: part.config._attn_implementation for path, part in attached_parts(model)}
    want = logits(model, inputs)
    calls = []

    def watch(call):
        calls.append(call)
        return call.stock()

    attachment = attach(model, watch)
    assert torch.equal(logits(model, inputs), want)
    assert {call.layer for call in calls} == set(attachment.layers) == set(heads_of(model))
    for call in calls:
        num_heads, head_dim = heads_of(model)[call.layer]
        assert call.q.shape[2:] == (num_heads, head_dim)
    twin = copy.deepcopy(model)
    attachment.detach()
    calls.clear()
    assert torch.equal(logits(model, inputs), want) and not calls
    assert {
        path: part.config._attn_implementation for path, part in attached_parts(model)
    } == before
    assert torch.equal(logits(twin, inputs), want) and calls, "a copy has the watcher of its own"


def attached_parts(model):
    return [(path, part) for path, part in model.named_modules() if hasattr(part, "config")]


def test_exact_equals_stock_to_rounding(made):
    name, model, inputs = made
    want = logits(model, inputs)
    with sparse_dit.patch(model, "exact") as handle:
        got = logits(model, inputs)
    summary = handle.summary()
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    if name in STOCK or name in UNMASKED:
        assert summary.sparse_calls == 0 and torch.equal(got, want)
    else:
        assert summary.sparse_calls > 0 and not torch.equal(got, want)
    assert torch.equal(logits(model, inputs), want)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_padded_batches_are_exact_where_there_are_tokens(name, side):
    model, inputs = text(name)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, slice(0, 7) if side == "left" else slice(33, 40)] = 0
    inputs["attention_mask"] = mask
    want = logits(model, inputs)
    with sparse_dit.patch(model, "exact") as handle:
        got = logits(model, inputs)
    real = mask.bool()
    assert (got[real] - want[real]).abs().max() <= 1e-5 * want[real].abs().max()
    assert got.isfinite().all()
    ran = handle.summary()
    assert (ran.sparse_calls == 0) == (name in STOCK)
    assert name in STOCK or ran.density < 1
