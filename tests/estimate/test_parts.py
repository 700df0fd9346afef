"""Shapes by the modality of rows and of keys, and one's own image: against calls of these alone."""

import pytest
import torch

from sparse_dit.attention import sparse_attention
from sparse_dit.backends.cpu import library
from sparse_dit.estimate import (
    Budget,
    ByKey,
    ByQuery,
    Dense,
    Grid,
    OwnPart,
    PooledBlocks,
    SinkWindow,
    VerticalSlash,
    estimated_index,
    sighted,
)
from sparse_dit.estimate.budget import candidates, choose, within
from sparse_dit.estimate.parts import by_keys, by_rows
from sparse_dit.estimate.rows import call_rows
from sparse_dit.intervals import RowIntervals
from sparse_dit.modalities import Modalities
from tests.estimate.cases import covers, tensors
from tests.estimate.test_grid import split, video

pytestmark = pytest.mark.usefixtures("way")
FIXED = Budget(alpha=90.0, beta=0.0, least=1)
SLASH = VerticalSlash(rows="last", sampled=24, budget=FIXED, sinks=3)
OTHER = VerticalSlash(rows="spread", sampled=30, budget=Budget(alpha=60.0, beta=0.0, least=1))
BLOCKS = PooledBlocks(budget=FIXED, sinks=3)
NEAR = SinkWindow(sinks=5, budget=FIXED)
LINES = Grid(sampled=24, budget=Budget(alpha=120.0, beta=0.0, least=1), slash=False)
# text, a video from token 192 to the end; and one with all kinds, whose parts begin anywhere
LATE = Modalities(192 + 240, (video(5, 6, 8, 192),))
MIXED = Modalities(
    520, (video(1, 7, 9, 20, "image"), *split(4, 6, 9, 101, 5, clip=1), video(1, 5, 8, 400, "image", 2))
)  # fmt: skip


def seen(q, k, shapes, **how):
    return covers(estimated_index(q, k, shapes, **how))


def kinds(where):
    return where.kinds()


@pytest.mark.parametrize("text", [SLASH, OTHER, BLOCKS, NEAR, Dense()])
@pytest.mark.parametrize("moving", [SLASH, OTHER, LINES, BLOCKS, NEAR, OwnPart(sinks=4)])
def test_rows_of_a_modality_are_as_if_alone(text, moving):
    n, first = LATE.length, 192
    q, k = tensors(n, n)
    found = seen(q, k, [ByQuery(text=text, video=moving)] * 4, modalities=LATE)
    alone = seen(q[:, :, :first], k[:, :, :first], [text] * 4)
    assert torch.equal(found[:, :first, :first], alone) and not found[:, :first, first:].any()
    alone = seen(q[:, :, first:], k, [moving] * 4, modalities=LATE)
    assert torch.equal(found[:, first:], alone)


def test_heads_of_several_shapes_and_a_chunk():
    n = MIXED.length
    q, k = tensors(200, n)
    shape = ByQuery(text=SLASH, image=OwnPart(), video=LINES)
    shapes = [shape, SLASH, ByQuery(text=NEAR, image=NEAR, video=NEAR), shape]
    index = estimated_index(q, k, shapes, modalities=MIXED)
    found = covers(index)
    for head, one in enumerate(shapes):
        assert torch.equal(found[head], seen(q, k, [one] * 4, modalities=MIXED)[head])
    assert len(set(index.head_to_pattern)) == 4
    same = kinds(MIXED)[320:] == 0
    assert torch.equal(found[2], seen(q, k, [NEAR] * 4)[2]) and same.any()
    own = torch.arange(200) + 320
    assert found[:, torch.arange(200), own].all()


@pytest.mark.parametrize("shapes", [(NEAR, BLOCKS), (OwnPart(), NEAR), (Dense(), BLOCKS)])
def test_keys_of_a_modality_are_those_of_its_shape(shapes):
    """Shapes whose choice doesn't hang on which keys may be chosen."""
    first, second = shapes
    q, k = tensors(MIXED.length, MIXED.length)
    found = seen(q, k, [ByKey(text=first, image=second, video=second)] * 4, modalities=MIXED)
    text = kinds(MIXED) == 0
    wide = Budget(alpha=1e5, least=1)
    for mine, shape in ((text, first), (~text, second)):
        if isinstance(shape, PooledBlocks):
            continue  # its blocks are chosen among its keys' alone
        want = seen(q, k, [shape] * 4, modalities=MIXED)
        assert torch.equal(found & mine, want & mine)
    all_of_it = [ByKey(*[VerticalSlash(budget=wide)] * 3)] * 4
    assert torch.equal(seen(q, k, all_of_it, modalities=MIXED), seen(q, k, [Dense()] * 4))


def test_both_boundaries():
    n = MIXED.length
    q, k = tensors(n, n)
    pairs = ByKey(text=SLASH, image=NEAR, video=LINES)
    shape = ByQuery(text=pairs, image=OwnPart(), video=ByKey(text=NEAR, image=BLOCKS, video=LINES))
    index = estimated_index(q, k, [shape] * 4, modalities=MIXED)
    found, of = covers(index), kinds(MIXED)
    alone = seen(q, k, [ByQuery(text=pairs, image=pairs, video=pairs)] * 4, modalities=MIXED)
    assert torch.equal(found[:, of == 0], alone[:, of == 0])
    near = seen(q, k, [NEAR] * 4)
    rows = of == 2
    assert torch.equal(found[:, rows][:, :, of == 0], near[:, rows][:, :, of == 0])
    for entry in index.entries:
        assert entry.q_offsets.diff().max() <= 64
        ends = entry.runs[:, 0] + entry.runs[:, 1]
        for g in range(entry.num_groups):
            runs = slice(int(entry.run_offsets[g]), int(entry.run_offsets[g + 1]))
            assert (entry.runs[runs, 0][1:] > ends[runs][:-1]).all(), "ascending, not touching"
    causal = torch.arange(1, n + 1).sum()
    assert index.density == pytest.approx(float(found.double().sum((1, 2)).mean() / causal))
    if library.LIBRARY is not None:
        v = torch.randn(k.shape, generator=torch.Generator().manual_seed(1))
        out = sparse_attention(q, k, v, index, backend="cpu")
        want = sparse_attention(q, k, v, index, backend="reference")
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


def test_a_choice_among_some_keys_is_one_without_the_others():
    n = 300
    call = call_rows(n, n, None)
    generator = torch.Generator().manual_seed(0)
    columns, diagonals = (
        torch.rand(3, n, generator=generator),
        torch.rand(3, 5, generator=generator),
    )
    keys = torch.rand(n, generator=generator) < 0.4
    sizes = {"sinks": 4, "local": 64}
    found = choose(columns, diagonals, call, FIXED, keys=keys, **sizes)
    scores, costs, forced = candidates(columns, diagonals, call, **sizes)
    some = torch.nn.functional.pad(keys, (0, 5), value=True) | forced
    want = within(scores[:, some], costs[some], forced[some], call.budget(90))
    assert torch.equal(found[:, some], want) and not found[:, ~some].any()
    assert 0 < want[:, 4:-5].sum() < some.sum()


@pytest.mark.parametrize("n", [520, 130])
@pytest.mark.parametrize("padded", [False, True])
def test_ones_own_part(n, padded):
    m = MIXED.length
    q, k = tensors(n, m)
    rows, first = None, 0
    if padded:
        first = 9
        rows = RowIntervals(start=torch.full((1, n), first).int())
    found = seen(q, k, [OwnPart(sinks=6)] * 4, modalities=MIXED, rows=rows)
    part = torch.empty(m, dtype=torch.long)
    for number, one in enumerate(MIXED.parts):
        part[one.start : one.stop] = number
    own = torch.arange(m - n, m)[:, None]
    key = torch.arange(m)
    want = ((part[own] == part) | ((key >= first) & (key < first + 6))) & (key <= own)
    assert torch.equal(found, want.expand(4, -1, -1))


def test_images_whose_rows_see_one_another():
    """Gemma 3's: causal order, but inside an image. The index names all that the mask lets through."""
    m = MIXED.length
    q, k = tensors(m, m)
    stop = torch.arange(1, m + 1)
    for part in MIXED.media:
        if part.kind == "image":
            stop[part.start : part.stop] = part.stop
    rows = RowIntervals(stop=stop.int()[None])
    own = ByQuery(text=Dense(), image=OwnPart(sinks=1 << 19), video=NEAR)
    index = estimated_index(q, k, [own, NEAR, own, Dense()], modalities=MIXED, rows=rows)
    assert torch.equal(index.rows.stop.long(), stop)
    found, image = covers(index), kinds(MIXED) == 1
    inside = torch.arange(m) < stop[:, None]
    assert torch.equal(found[0][image], inside[image]) and torch.equal(found[3], inside)
    plain = estimated_index(q, k, [NEAR] * 4, modalities=MIXED)
    assert (plain.rows.stop == torch.arange(1, m + 1)).all()


def test_without_images_rows_are_text():
    q, k = tensors(260, 260)
    shape = ByQuery(text=ByKey(text=SLASH), image=Dense(), video=Dense())
    for where in (None, Modalities(260), Modalities(260, unknown="no one knows")):
        found = seen(q, k, [shape, OwnPart(), Grid(budget=FIXED), NEAR], modalities=where)
        assert torch.equal(found[0], seen(q, k, [SLASH] * 4)[0])
        assert torch.equal(found[1], seen(q, k, [Dense()] * 4)[1])
    assert [sighted([shape]), sighted([SLASH, NEAR, BLOCKS, Dense()])] == [True, False]


@pytest.mark.parametrize("n", [1, 63, 64, 65, 300])
def test_entries_of_random_parts(n):
    q, k = tensors(n, n + 20)
    generator = torch.Generator().manual_seed(n)
    pick = estimated_index(q, k, [SLASH, BLOCKS, NEAR, Dense()])
    parts = [pick.entries[place] for place in pick.head_to_pattern]
    masks = covers(pick)
    for spread in (3, 40):
        owner = torch.randint(4, (n // spread + 1,), generator=generator).repeat_interleave(spread)
        entry = by_rows(parts, owner[:n])
        got = covers(type(pick)((entry,), (0,), pick.rows))
        assert torch.equal(got[0], masks[owner[:n], torch.arange(n)])
        keys = torch.randint(4, (n // spread + 21,), generator=generator)
        keys = keys.repeat_interleave(spread)[: n + 20]
        entry = by_keys(parts, keys, range(4))
        got = covers(type(pick)((entry,), (0,), pick.rows))
        assert torch.equal(got[0], masks[keys, :, torch.arange(n + 20)].T)
