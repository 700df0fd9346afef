"""Published rules for a prefill: what each computes of a made-up call, against slow forms of the same."""

import math

import pytest
import torch

from sparse_dit.eval.baselines.antidiagonal import antidiagonal_index, block_scores
from sparse_dit.eval.baselines.text import RULES, TAU, heads_first, pooled_distance
from sparse_dit.eval.language.frontier import Ruled
from sparse_dit.integrations import attached
from sparse_dit.search.language.scores import seen_by
from tests.helpers.tiny_language_models import logits, text

TOKENS = 2000


@pytest.fixture(scope="module")
def call():
    """A layer's call of a tiny model."""
    model, inputs = text("llama", batch=1, length=TOKENS)
    found = []

    def keep(call):
        found.append(call)
        return call.stock()

    with attached(model, {"model": keep}):
        logits(model, inputs)
    return found[-1]


@pytest.mark.parametrize("method", RULES)
def test_a_rule_is_causal_and_computes_more_for_greater_numbers(call, method):
    rule = RULES[method]
    found = [rule.index(call, number) for number in rule.numbers]
    densities = [index.density for index in found]
    assert densities == pytest.approx(sorted(densities), abs=1e-3)
    assert densities[0] < 0.75 and densities[-1] > densities[0]
    rows = torch.arange(TOKENS)
    for entry in found[0].entries:
        seen = seen_by(entry, rows)
        assert seen.diagonal().all(), "each row sees its own key"
        assert seen[:, 0].all(), "and the first"


@pytest.mark.parametrize("method", RULES)
def test_a_rule_runs_in_a_model_and_its_density_is_counted(method):
    model, inputs = text("llama", batch=1, length=TOKENS)
    want = logits(model, inputs)
    rule = RULES[method]
    ruled = Ruled(lambda call: rule.index(call, rule.numbers[0]))
    with attached(model, {"model": ruled}):
        got = logits(model, inputs)
    assert not torch.equal(got, want) and got.isfinite().all()
    assert len(ruled.indices) == 2 and ruled.stock == 0 and ruled.seconds > 0
    assert ruled.density == pytest.approx(sum(index.density for index in ruled.indices) / 2)


def test_antidiagonal_scores_are_the_softmax_of_summed_logits():
    torch.manual_seed(0)
    q, k, stride, scale = torch.randn(128, 8), torch.randn(128, 8), 16, 0.3
    every = q @ k.T * scale
    coarse = torch.full((8, 8), -math.inf)
    for a in range(8):
        for b in range(a + 1):
            square = every[a * 16 : a * 16 + 16, b * 16 : b * 16 + 16]
            coarse[a, b] = square.flip(0).diagonal().sum() / stride
    p = coarse.softmax(-1)
    want = torch.stack(
        [torch.stack([p[i : i + 4, j : j + 4].sum() / 4 for j in (0, 4)]) for i in (0, 4)]
    )
    torch.testing.assert_close(block_scores(q, k, stride, scale), want)


def test_a_block_that_many_attend_to_is_chosen():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 640, 16), 0.01 * torch.randn(1, 1, 640, 16)
    q[..., 0], k[:, :, 128:192, 0] = 8.0, 8.0  # the third block
    index = antidiagonal_index(q, k, stride=8, threshold=0.5, scale=0.25)
    assert index.num_heads == 2 and 0.1 < index.density < 0.6
    seen = seen_by(index.entries[0], torch.tensor([639]))[0]
    blocks = seen.unflatten(0, (-1, 64)).all(-1).nonzero()[:, 0].tolist()
    assert blocks == [0, 2, 9], "the first, the one that is attended to, and its own"


def test_pooled_blocks_are_trusted_where_they_tell_what_the_last_rows_see():
    torch.manual_seed(0)
    alike = torch.zeros(1, 1, 2560, 16)  # all keys alike: pooling loses nothing
    q = torch.randn(1, 2, 2560, 16)
    assert (pooled_distance(q, alike, 0.25) < TAU).all()
    lone = 0.01 * torch.randn(1, 1, 2560, 16)
    lone[..., 100, :] = 60.0  # one key that all attend to, diluted in its block's mean
    q = q.abs()
    assert (pooled_distance(q, lone, 0.25) > TAU).all()


def test_heads_of_one_layer_are_told_apart_by_flexprefill(call):
    q, k = heads_first(call)
    distances = pooled_distance(q, k, 0.25)
    assert distances.shape == (4,) and ((distances >= 0) & (distances < 1)).all()
    index = RULES["flexprefill"].index(call, 0.5)
    assert index.num_heads == 4
