"""Blocks that are chosen on the device of queries and keys: those that are chosen on the host."""

import itertools
from dataclasses import replace

import pytest
import torch

from sparse_dit.attention import attend
from sparse_dit.estimate.blocks import blocks_of
from sparse_dit.estimate.blockwise import blockwise_entries, estimates_of
from sparse_dit.estimate.on_device import blocks_of_mass, blocks_on_device, sees_all, takes
from sparse_dit.estimate.scores import mass_by_block, mass_stretch
from sparse_dit.index import SparseIndex
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Antidiagonal, Budget, Cluster, Mass, Pattern, Pooled, Share
from tests.estimate.cases import tensors
from tests.estimate.test_blockwise import LAYOUTS, PATTERNS
from tests.test_reuse import call_at

CASES = list(itertools.product(PATTERNS, LAYOUTS))
BUDGETS = [Budget(beta=beta, least=1) for beta in (0.0, 0.1, 0.37, 0.8, 1.0)]


def seen(chosen):
    """Bool `[C, C]` of what is kept as bits."""
    count = len(chosen.places.bounds) - 1
    eights = (chosen.bits[:, :, None].int() >> torch.arange(8)) & 1
    return eights.bool().flatten(1)[:, :count]


def assert_same(found, want):
    assert found.seen.keys() == want.keys()
    for head, chosen in found.seen.items():
        assert chosen.places is want[head].seen.blocks.places
        assert torch.equal(seen(chosen), want[head].seen.mask), head


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_shape_chooses_the_same_blocks(name, layout):
    pattern, size = PATTERNS[name], LAYOUTS[layout]
    q, k = tensors(size.seq_len, size.seq_len, batch=2, heads=6, kv_heads=2)
    patterns = {5: pattern, 1: pattern, 2: replace(pattern, tile=(1, 2, 8))}
    found = blocks_on_device(q, k, patterns, size, 0.3)
    assert found.sound
    assert_same(found, blockwise_entries(q, k, patterns, size, 0.3))


@pytest.mark.parametrize("keep", [*BUDGETS, Share(0.0, 1), Share(1.0, 64)], ids=str)
@pytest.mark.parametrize("kind", [Pooled, Antidiagonal])
def test_budgets_from_nothing_to_all(kind, keep):
    layout = TokenLayout.video(3, 6, 10, text_before=0)
    pattern = Pattern(kind(keep), tile=(2, 4, 4), far=True)
    q, k = tensors(layout.seq_len, layout.seq_len)
    found = blocks_on_device(q, k, {0: pattern, 3: pattern}, layout, 0.3)
    assert_same(found, blockwise_entries(q, k, {0: pattern, 3: pattern}, layout, 0.3))
    whole = all(seen(chosen).all() for chosen in found.seen.values())
    assert whole == (getattr(keep, "beta", getattr(keep, "gamma", 0)) == 1.0)
    assert whole or not sees_all(pattern, layout)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("keep", [*BUDGETS, Share(0.7, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_counted_mass(layout, keep, adaptive):
    pattern = Pattern(Mass(keep, adaptive=adaptive, local=1), tile=(2, 2, 4))
    blocks, heads = blocks_of(pattern, layout), (0, 2, 3, 4, 5)
    q, k = tensors(layout.seq_len, layout.seq_len, batch=2, heads=6)
    q = q * torch.tensor([0.1, 1, 2, 4, 8, 16])[:, None, None]  # heads of different recall
    index = SparseIndex((blocks.whole,), (0,) * 6)
    stretch = mass_stretch(blocks)
    mass = attend(q, k, k, index, mass_block=stretch).mass
    found = blocks_of_mass(mass, dict.fromkeys(heads, pattern), layout, stretch)
    p = mass_by_block(mass[:, list(heads)], blocks, stretch).mean(0)
    want = estimates_of(p, None, pattern.shape, blocks)
    assert found.sound
    assert_same(found, dict(zip(heads, want, strict=True)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["pooled", "above", "antidiagonal"])
def test_heads_with_nan_see_all_and_no_other(name, bad):
    layout = LAYOUTS["text"]
    q, k = tensors(layout.seq_len, layout.seq_len)
    q[0, 1, 40, 3] = bad
    found = blocks_on_device(q, k, dict.fromkeys(range(4), PATTERNS[name]), layout, 0.3)
    assert not found.sound
    dense = [bool(seen(chosen).all()) for chosen in found.seen.values()]
    assert dense == [False, True, False, False]


def test_the_choice_of_bfloat16_is_that_of_its_values():
    layout, pattern = LAYOUTS["ragged"], PATTERNS["pooled"]
    q, k = (x.bfloat16() for x in tensors(layout.seq_len, layout.seq_len))
    found = blocks_on_device(q, k, {0: pattern}, layout, 0.3)
    assert_same(found, blockwise_entries(q, k, {0: pattern}, layout, 0.3))


def test_other_calls_are_left_to_the_host():
    """On a CPU without Triton's interpreter none is taken."""
    call = call_at(0)
    for shape in (Pooled(), Cluster(Share(0.5, 1))):
        assert not takes(call, [Pattern(shape)] * 3, "auto")
        assert not takes(call, [Pattern(shape)] * 3, "triton")
