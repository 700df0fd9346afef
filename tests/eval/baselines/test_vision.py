"""Published rules for a VLM's prefill, on a made-up prompt with two images and a text between."""

import pytest
import torch

from sparse_dit.call import AttentionCall, StepContext
from sparse_dit.eval.baselines.vision import VISION_RULES, blindsight_classes, sink_keys
from sparse_dit.intervals import causal_items
from sparse_dit.modalities import Modalities, Part
from sparse_dit.search.language.scores import seen_by

TOKENS, HEADS = 500, 4
IMAGES = ((40, 200), (230, 390))  # first token, and the one behind the last


@pytest.fixture(scope="module")
def where():
    media = [Part("image", *ends, (1, 16, 10), clip=n) for n, ends in enumerate(IMAGES)]
    return Modalities(TOKENS, tuple(media))


def call_of(q, k, where):
    context = StepContext(modalities=(where,))
    q, k = (x.transpose(1, 2) for x in (q, k))
    rows = causal_items(1, TOKENS)
    return AttentionCall("layer", q, k, k, None, None, 1.0, context, None, lambda: q, rows=rows)


@pytest.fixture
def made(where):
    """Queries and keys of four heads: flat; the first token of each image; their own image; both alike."""
    d = 8
    q, k = torch.zeros(1, HEADS, TOKENS, d), torch.zeros(1, HEADS, TOKENS, d)
    q[..., 0] = 30.0
    k[0, 1, sink_keys(where), 0] = 1.0
    for number, (start, stop) in enumerate(IMAGES, 1):
        q[0, 2:, start:stop, number] = 30.0
        k[0, 2:, start:stop, number] = 1.0
        q[0, 2:, start:stop, 0] = 0.0
    k[0, 3, sink_keys(where), 1:3] = 1.2  # seen by both images' rows
    return q, k


def test_heads_are_classed_by_what_holds_their_probability(made, where):
    q, k = made
    classes = blindsight_classes(q[0], k[0], where, 0.9, 1.0)
    assert classes.tolist() == [0, 1, 2, 1]
    k[0, 3, sink_keys(where), 1:3] = 1.0
    k[0, 3, IMAGES[0][0], 1:3] = (
        1.12  # as much as the rest of the second image, and of another part
    )
    classes = blindsight_classes(q[0], k[0], where, 0.9, 1.0)
    assert classes.tolist() == [0, 1, 2, 3]


def test_rows_of_images_see_what_their_class_says_and_text_sees_all(made, where):
    q, k = made
    index = VISION_RULES["blindsight"].index(call_of(q, k, where), 0.9)
    every = torch.arange(TOKENS)
    causal = every <= every[:, None]
    images = where.kinds() > 0
    for head, number in enumerate(index.head_to_pattern):
        seen = seen_by(index.entries[number], every) & causal
        assert torch.equal(seen[~images], causal[~images]), "text"
        kind = int(blindsight_classes(q[0], k[0], where, 0.9, 1.0)[head])
        row = IMAGES[1][1] - 1
        own, other = slice(*IMAGES[1]), slice(IMAGES[0][0] + 1, IMAGES[0][1])
        assert bool(seen[row, other].all()) == (kind == 0)
        assert bool(seen[row, own].all()) == (kind in (0, 2, 3))
        assert bool(seen[row, sink_keys(where)[:4]].all()) == (kind in (0, 1, 3))
        assert seen[images].diagonal(int(images.nonzero()[0])).any() and seen.diagonal().all()


@pytest.mark.parametrize("method", VISION_RULES)
def test_the_density_rises_with_the_number(where, method):
    torch.manual_seed(0)
    q, k = (torch.randn(1, HEADS, TOKENS, 8) for _ in range(2))
    rule = VISION_RULES[method]
    found = [rule.index(call_of(q, k, where), number).density for number in rule.numbers]
    assert found == pytest.approx(sorted(found), abs=1e-3) and found[0] < found[-1]


def test_without_images_blindsight_is_dense(where):
    q = torch.randn(1, HEADS, TOKENS, 8)
    assert VISION_RULES["blindsight"].index(call_of(q, q, Modalities(TOKENS)), 0.9).is_dense
