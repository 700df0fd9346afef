"""Scores on sampled rows: they are what the kernel computes, and gradients tell what that changes."""

import pytest
import torch

from sparse_dit.attend_call import attend_call
from sparse_dit.backends.reference import token_mask
from sparse_dit.estimate import estimated_index
from sparse_dit.integrations import attached
from sparse_dit.search.language import costs as timed_costs
from sparse_dit.search.language.items import Item, sampled_rows
from sparse_dit.search.language.reading import Passkey, Text, passkeys, read
from sparse_dit.search.language.scores import Scorer, influences, seen_by
from tests.helpers.language_plans import DENSE, NEAR, SLASH
from tests.helpers.tiny_language_models import logits, text, tokenizer

PATTERNS = (DENSE, NEAR, SLASH)


@pytest.fixture(scope="module")
def llama():
    return text("llama", batch=1, length=300)


def all_rows(ids):
    """An item whose rows are all of them."""
    return Item.of_text(Text.of(ids), rows=ids.shape[1], seed=0, share=1.0)


def test_the_rows_are_spread_and_stand_for_all():
    rows = sampled_rows(1000, 50, seed=3)
    assert len(rows.unique()) == 50
    assert torch.equal(rows // 20, torch.arange(50)), "one from each part"
    assert torch.equal(sampled_rows(10, 50, seed=0), torch.arange(10))
    item = Item.of_text(Text.of(torch.zeros(1, 1000, dtype=torch.long)), 50, 0, 1.0)
    assert item.weights.sum() == pytest.approx(1000)
    asked = Item.of_passkey(Passkey(torch.zeros(1, 1000, dtype=torch.long), 5, 0.5), 50, 0, 0.1)
    assert asked.weights.sum() == pytest.approx(1000)
    assert asked.places.tolist() == [994, 995, 996, 997, 998]
    assert asked.rows[-32:].tolist() == list(range(968, 1000))


def test_what_rows_see_is_what_the_reference_says():
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 300, 16), torch.randn(1, 2, 300, 16)
    index = estimated_index(q, k, [pattern.shape for pattern in (SLASH, SLASH, NEAR, DENSE)])
    rows = torch.tensor([0, 1, 63, 64, 150, 299])
    causal = torch.arange(300) <= rows[:, None]
    for head, place in enumerate(index.head_to_pattern):
        entry = index.entries[place]
        want = token_mask(entry)[0][rows]
        assert torch.equal(seen_by(entry, rows) & causal, want & causal), head


def test_errors_are_those_of_the_kernel(llama):
    model, inputs = llama
    item, found, calls = all_rows(inputs["input_ids"]), {}, {}

    def watch(call):
        calls[call.layer] = call
        return call.stock()

    with attached(model, {"model": watch}):
        logits(model, inputs)
    grads = {name: torch.ones(1, 300, 4, 16) for name in calls}
    with attached(model, {"model": Scorer(PATTERNS, item, grads, found)}):
        logits(model, inputs)
    for name, call in calls.items():
        exact = call.stock()[0]
        assert found[name]["text"].pairs == 1 and len(found[name]) == 1
        for number, pattern in enumerate(PATTERNS):
            q, k = call.q.transpose(1, 2), call.k.transpose(1, 2)
            index = estimated_index(q, k, [pattern.shape] * 4, scale=call.scale)
            change = attend_call(call, index)[0][0] - exact
            error = change.square().sum((0, 2)).double()
            torch.testing.assert_close(
                found[name]["text"].error[:, number], error, rtol=1e-3, atol=1e-8
            )
            along, anyhow = change.sum(-1).square().sum(0), change.square().sum((0, 2))
            loss = 0.25 * (along + anyhow).double() / len(item.places)
            torch.testing.assert_close(
                found[name]["text"].loss[:, number], loss, rtol=1e-3, atol=1e-8
            )
            torch.testing.assert_close(
                found[name]["text"].density[:, number], index.head_density, rtol=1e-4, atol=0
            )


def test_gradients_tell_what_a_change_of_a_head_does(llama):
    model, inputs = llama
    item = all_rows(inputs["input_ids"])
    grads = influences(model, item, draws=1, seed=0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    layer, head = next(iter(grads)), 2
    change = torch.zeros(1, 300, 4, 16)
    change[0, 40:60, head] = 1e-3

    def changed(call):
        return call.stock() + change if call.layer == layer else call.stock()

    drawn = torch.Generator().manual_seed(0)
    before = logits(model, inputs)[0, item.places].log_softmax(-1)
    tokens = torch.multinomial(before.exp(), 1, generator=drawn)
    with attached(model, {"model": changed}):
        after = logits(model, inputs)[0, item.places].log_softmax(-1)
    moved = (after - before).gather(1, tokens).sum()
    forecast = (grads[layer][0] * change[0]).sum()
    assert moved == pytest.approx(forecast.item(), rel=0.02)


def test_a_reading_is_compared_with_the_dense_one(llama):
    model, inputs = llama
    told = Text.of(inputs["input_ids"], positions=32)
    assert told.positions[0] == 149 and told.positions[-1] == 298
    dense = read(model, told)
    want = logits(model, inputs)[0].log_softmax(-1)
    torch.testing.assert_close(dense.log_probs, want[told.positions])
    assert dense.divergence(dense) == 0 and dense.perplexity_increase(dense, told) == 0
    loss = torch.nn.functional.nll_loss(
        want[told.positions], inputs["input_ids"][0, told.positions + 1]
    )
    assert dense.loss(told) == pytest.approx(loss.item(), rel=1e-5)


def test_passkeys_hide_a_number_and_ask_for_it():
    words = tokenizer()
    (first, second) = passkeys(words, 600, (0.1, 0.9))
    for passkey in (first, second):
        assert passkey.ids.shape[1] <= 600
        written = "".join(chr(n) for n in passkey.ids[0].tolist())
        key = written[-5:]
        assert key.isdigit() and written.count(key) == 3
        assert abs(written.index(key) / len(written) - passkey.depth) < 0.15
    assert torch.equal(first.ids, passkeys(words, 600, (0.1,))[0].ids)
    with pytest.raises(ValueError, match="a passkey needs a text of at least"):
        passkeys(words, 100, (0.5,))


def test_costs_are_of_each_pattern(llama):
    model, inputs = llama
    costs = {}

    def watch(call):
        costs[call.layer] = timed_costs.costs_of(call, PATTERNS)
        return call.stock()

    with attached(model, {"model": watch}):
        logits(model, inputs)
    for found in costs.values():
        assert found.stock > 0 and len(found.sparse) == 3 and min(found.sparse) > 0
        torch.testing.assert_close(
            found.call.stock(),
            attend_call(found.call, estimated(found.call))[0],
            rtol=1e-4,
            atol=1e-5,
        )


def estimated(call):
    return estimated_index(call.q.transpose(1, 2), call.k.transpose(1, 2), [DENSE.shape] * 4)
