"""Blocks of a grid, found in queries and keys: every shape against a plain restatement."""

import itertools
from dataclasses import replace

import pytest
import torch

from sparse_dit.attention import attend
from sparse_dit.backends.cpu import estimates, library
from sparse_dit.backends.reference import token_mask
from sparse_dit.curve import Curve
from sparse_dit.estimate.blocks import blocks_of, token_orders
from sparse_dit.estimate.blockwise import adapted, best_blocks, blockwise_entries, estimates_of
from sparse_dit.estimate.scores import (
    antidiagonal_scores,
    block_means,
    mass_by_block,
    mass_stretch,
    means_by_torch,
)
from sparse_dit.index import SparseIndex
from sparse_dit.layout import Segment, TokenLayout, tile_order
from sparse_dit.patterns import Above, Antidiagonal, Budget, Mass, Pattern, Pooled, Share
from tests.estimate.cases import tensors

LAYOUTS = {
    "video": TokenLayout.video(4, 4, 8, text_before=0),
    "ragged": TokenLayout.video(3, 5, 7, text_before=0),
    "text": TokenLayout.video(3, 5, 7, text_before=6, text_after=9),
    "image": TokenLayout((Segment.global_(5), Segment.grid(1, 11, 9))),
    "sequence": TokenLayout.sequence(150),
    "one": TokenLayout.sequence(1),
}
LITTLE, MUCH = Budget(beta=0.2, least=1), Budget(beta=0.7, least=1)
PATTERNS = {
    "pooled": Pattern(Pooled(LITTLE), tile=(2, 2, 4), far=True),
    "parts": Pattern(Pooled(MUCH, parts=3), tile=(2, 3, 4)),
    "share": Pattern(Pooled(Share(0.6, 1), local=1), tile=(1, 4, 4), far=True, pool=3),
    "above": Pattern(Pooled(Above(0.3), local=2), tile=Curve("video", tokens=16), far=True),
    "raster": Pattern(Pooled(LITTLE), tile=(None, None, None), cell=32, far=True),
    "antidiagonal": Pattern(Antidiagonal(Share(0.7, 1), stride=4), tile=(2, 2, 4), far=True),
    "large tiles": Pattern(Antidiagonal(LITTLE, stride=3), tile=(4, 4, 8), sink_frames=1),
}
CASES = pytest.mark.parametrize(
    ("name", "layout"), list(itertools.product(PATTERNS, LAYOUTS.values())), ids=str
)


def members(pattern, layout):
    """The tokens of each block, in the pattern's order."""
    order = tile_order(layout, pattern.tile)
    cells = (order.cell_offsets(pattern.cell) + order.global_before).tolist()
    return [order.order[a:b].tolist() for a, b in itertools.pairwise(cells)]


def cut(tokens, size):
    """Stretches of at most so many tokens."""
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


def plain_scores(q, k, pattern, layout, scale):
    """What a shape says of each pair of blocks, `[C, C]`, and the logits of whole blocks; q, k `[N, D]`."""
    blocks, shape = members(pattern, layout), pattern.shape
    if isinstance(shape, Antidiagonal):
        return plain_antidiagonal(q, k, blocks, shape.stride, scale), None
    size = -(-max(map(len, blocks)) // shape.parts)
    parts = [(c, part) for c, tokens in enumerate(blocks) for part in cut(tokens, size)]
    mean_q, mean_k = (torch.stack([x[part].mean(0) for _, part in parts]) for x in (q, k))
    logits = mean_q @ mean_k.T * scale
    weighted = logits
    if shape.parts == 1:
        weighted = logits + torch.tensor([len(part) for _, part in parts]).log()
    p = weighted.softmax(-1)
    found = torch.zeros(len(blocks), len(blocks), dtype=q.dtype)
    for (i, (c, _)), (j, (d, _)) in itertools.product(enumerate(parts), enumerate(parts)):
        found[c, d] += p[i, j] / sum(of == c for of, _ in parts)
    return found, logits


def plain_antidiagonal(q, k, blocks, stride, scale):
    """Sums of logits along antidiagonals, their softmax, and its sums by the blocks of squares' tokens."""
    tokens = list(itertools.chain(*blocks))
    owner = [c for c, of in enumerate(blocks) for _ in of]
    q, k = (torch.nn.functional.pad(x[tokens], (0, 0, 0, -len(x[tokens]) % stride)) for x in (q, k))
    logits = torch.zeros(len(q) // stride, len(q) // stride, dtype=q.dtype)
    for step in range(stride):
        logits += q[stride - 1 - step :: stride] @ k[step::stride].T * scale / stride
    p = logits.softmax(-1).repeat_interleave(stride, 0).repeat_interleave(stride, 1) / stride
    owner += [owner[-1]] * (len(q) - len(owner))
    lies = torch.tensor(owner)[:, None] == torch.arange(len(blocks))
    return lies.to(p).T @ p @ lies.to(p) / lies.sum(0)[:, None]


def check_choice(chosen, p, logits, pattern, layout):
    """That the blocks `[C, C]` which a head sees are what its shape says of the scores."""
    shape, blocks = pattern.shape, members(pattern, layout)
    sizes = torch.tensor([len(tokens) for tokens in blocks])
    forced = blocks_of(pattern, layout).near(shape.local)
    assert chosen[forced].all()
    if isinstance(shape.keep, Above):
        level = logits.mean(-1, keepdim=True) + shape.keep.sigmas * logits.std(
            -1, keepdim=True, correction=0
        )
        clear = (logits - level).abs() > 1e-4
        assert ((chosen == (logits > level)) | ~clear | forced).all()
        return
    if isinstance(shape.keep, Share):
        order = (p / sizes).argsort(-1, descending=True)
        before = p.gather(-1, order).cumsum(-1) - p.gather(-1, order)
        wanted = torch.zeros_like(chosen).scatter(-1, order, before < shape.keep.gamma)
        clear = ((before - shape.keep.gamma).abs() > 1e-4).gather(-1, order.argsort(-1))
        assert ((chosen == wanted) | ~clear | forced).all()
        return
    each = p / sizes
    worst = torch.where(chosen & ~forced, each, torch.inf).amin(-1)
    best = torch.where(chosen | forced, -torch.inf, each).amax(-1)
    paid = (chosen * sizes).sum(-1)
    keys = shape.keep.keys(int(sizes.sum()))
    ranked = worst >= best - 1e-5
    assert ranked.all()
    assert (paid - (forced * sizes).sum(-1)).max() <= keys + sizes.max()


@CASES
def test_every_shape_chooses_what_a_plain_restatement_says(name, layout, way):
    pattern = PATTERNS[name]
    q, k = tensors(layout.seq_len, layout.seq_len, batch=2, heads=4, kv_heads=2)
    found = blockwise_entries(q, k, dict.fromkeys((1, 3), pattern), layout, 0.3)
    assert list(found) == [1, 3]
    blocks = members(pattern, layout)
    for head, estimate in found.items():
        assert estimate.sound and 0 <= estimate.recall <= 1 + 1e-6
        exact, pooled = token_mask(estimate.entry)
        plain = [
            plain_scores(q[b, head].double(), k[b, head // 2].double(), pattern, layout, 0.3)
            for b in range(2)
        ]
        p = torch.stack([scores for scores, _ in plain]).mean(0)
        listed = [of for _, of in plain if of is not None]
        logits = torch.stack(listed).mean(0) if listed else None
        first = torch.tensor([tokens[0] for tokens in blocks])
        chosen = exact[first][:, first]
        check_choice(chosen, p, logits, pattern, layout)
        owner = torch.full((layout.seq_len,), -1)
        for number, tokens in enumerate(blocks):
            owner[tokens] = number
        text = owner < 0
        assert torch.equal(exact, chosen[owner][:, owner] | text | text[:, None]), "whole blocks"
        assert (pooled is not None) == pattern.far
        if pattern.far:
            check_pooled(estimate.entry, exact, pooled, text)


def check_pooled(entry, exact, pooled, text):
    """That rows of the grid see each key of it exactly or pooled, and text sees all exactly."""
    bounds = entry.far.cell_offsets.tolist()
    seen = exact.clone()
    for cell, (start, stop) in enumerate(itertools.pairwise(bounds)):
        keys = entry.key_tokens[start:stop]
        assert not (pooled[:, cell, None] & exact[:, keys]).any()
        seen[:, keys] |= pooled[:, cell, None]
    assert seen.all() and not pooled[text].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_means_of_blocks(layout, dtype):
    pattern = Pattern(Pooled(), tile=(2, 2, 4))
    blocks = blocks_of(pattern, layout)
    x = torch.randn(2, layout.seq_len, 3, 12).transpose(1, 2).to(dtype)
    x[0, 0, 0, 0] = 2.0**-20  # of a half it is subnormal
    want = torch.stack([x[:, :, m].double().mean(2) for m in members(pattern, layout)], 2).float()
    for found in (
        block_means(x, blocks, blocks.bounds),
        means_by_torch(x, blocks.order.order, blocks.bounds),
        block_means(x.transpose(2, 3).contiguous().transpose(2, 3), blocks, blocks.bounds),
    ):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def test_antidiagonals_in_causal_order_leave_out_later_squares():
    q, k = torch.randn(2, 40, 8)
    found = antidiagonal_scores(q, k, torch.tensor([0, 16, 32, 40]), 4, 0.5, causal=True)
    assert torch.equal(found.triu(1), torch.zeros(3, 3))
    torch.testing.assert_close(found.sum(-1), torch.ones(3))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("tile", [(2, 2, 4), (4, 4, 8), (None, None, None)], ids=str)
def test_mass_that_a_dense_pass_counts_is_that_of_the_blocks(layout, tile):
    pattern = Pattern(Mass(), tile=tile, cell=16 if tile[0] is None else None)
    blocks = blocks_of(pattern, layout)
    q, k, v = torch.randn(3, 2, 2, layout.seq_len, 8, generator=torch.Generator().manual_seed(0))
    index = SparseIndex((blocks.whole,), (0, 0))
    stretch = mass_stretch(blocks)
    mass = attend(q, k, v, index, mass_block=stretch).mass
    assert mass is not None
    found = mass_by_block(mass, blocks, stretch)
    p = (q.double() @ k.double().transpose(2, 3) * 8**-0.5).softmax(-1)
    want = torch.stack(
        [
            torch.stack([p[:, :, a][..., b].sum(-1).mean(-1) for b in members(pattern, layout)], -1)
            for a in members(pattern, layout)
        ],
        -2,
    )
    if all(bound % stretch == 0 for bound in blocks.bounds.tolist()):
        torch.testing.assert_close(found, want.float(), rtol=1e-4, atol=1e-5)
    else:  # ends of stretches belong to two blocks, and are taken as even
        inside = want.sum((2, 3))
        torch.testing.assert_close(found.sum((2, 3)), inside.float(), rtol=0.3, atol=0.05)
        assert (found - want).abs().max() < 0.2


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.37, 0.8, 1.0])
def test_a_budget_is_met_on_average(beta):
    layout = TokenLayout.video(4, 16, 16, text_before=0)
    pattern = Pattern(Pooled(Budget(beta=beta, least=1)), far=True)
    blocks = blocks_of(pattern, layout)
    chosen = best_blocks(torch.rand(3, 16, 16), Budget(beta=beta, least=1).keys(1024), blocks.sizes)
    assert chosen.float().mean() == pytest.approx(beta, abs=0.02)
    assert chosen.sum(-1).max() - chosen.sum(-1).min() <= 1
    (entry,) = blocks.entries(chosen[:1])
    assert entry.density == pytest.approx(beta + (1 - beta) / 64, abs=0.03)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["pooled", "above", "antidiagonal"])
def test_heads_with_nan_are_dense_and_no_other(name, bad):
    layout = LAYOUTS["text"]
    q, k = tensors(layout.seq_len, layout.seq_len)
    q[0, 1, 40, 3] = bad
    found = blockwise_entries(q, k, dict.fromkeys(range(4), PATTERNS[name]), layout, 0.3)
    assert [estimate.sound for estimate in found.values()] == [True, False, True, True]
    assert [estimate.entry.is_dense for estimate in found.values()] == [False, True, False, False]


def test_constant_keys_are_as_good_as_any():
    layout = LAYOUTS["ragged"]
    q, k = tensors(layout.seq_len, layout.seq_len)
    found = blockwise_entries(q, torch.ones_like(k), {0: PATTERNS["pooled"]}, layout, 0.3)
    exact, _ = token_mask(found[0].entry)
    assert 0.1 < exact.float().mean() < 0.35


def test_adaspas_heads():
    assert adapted(torch.tensor([0.5, 0.95, 0.9, 0.85])) == [(0.5, [1, 2]), (1.5, [3, 0])]
    assert adapted(torch.tensor([0.5, 0.95, 0.1])) == [(0.5, [1]), (1.5, [2])]
    assert adapted(torch.tensor([0.5, 0.6])) == [(0.5, []), (1.5, [])]
    layout = TokenLayout.video(4, 16, 16, text_before=0)
    blocks = blocks_of(Pattern(Mass()), layout)
    near = torch.eye(16) + 1e-4
    p = torch.stack([near, torch.ones(16, 16) / 16])
    shape = Mass(Budget(beta=0.25, least=1), adaptive=True)
    densities = [estimate.entry.density for estimate in estimates_of(p, None, shape, blocks)]
    assert densities == pytest.approx([0.125, 0.375])


def test_orders_have_tiles_of_about_as_many_tokens():
    assert token_orders(LAYOUTS["image"]) == ((1, 8, 8), (1, 1, 64), (1, 64, 1))
    assert token_orders(TokenLayout.video(8, 24, 24)) == (
        (4, 4, 4), (None, 1, 8), (None, 8, 1), (1, 8, 8),
    )  # fmt: skip


def test_blocks_are_shared_by_patterns_that_differ_in_their_shape_alone():
    layout, one = LAYOUTS["ragged"], PATTERNS["pooled"]
    assert blocks_of(one, layout) is blocks_of(replace(one, shape=Mass()), layout)


def test_the_library_refuses_blocks_that_are_none():
    if library.LIBRARY is None:
        pytest.skip(str(library.PROBLEM))
    x, bounds = torch.zeros(1, 1, 8, 4), torch.tensor([0, 4, 8], dtype=torch.int32)
    chosen, owner = torch.ones(1, 2, 2, dtype=torch.bool), torch.tensor([0, 1], dtype=torch.int32)
    for wrong in (bounds.flip(0), bounds + 1, bounds * 0):
        with pytest.raises(ValueError, match="bounds of blocks must ascend"):
            estimates.means(x, None, wrong)
        with pytest.raises(ValueError, match="bounds of blocks must ascend"):
            estimates.lay_blocks(chosen, wrong, owner, 8, None)
    for wrong in (owner + 1, owner - 2):
        with pytest.raises(ValueError, match="groups belong to them"):
            estimates.lay_blocks(chosen, bounds, wrong, 8, None)
    with pytest.raises(ValueError, match="bounds of blocks must ascend"):
        estimates.means(x, torch.full((8,), 8, dtype=torch.int32), bounds)
    with pytest.raises(ValueError, match="must be int32"):
        estimates.means(x, None, bounds.long())
    with pytest.raises(ValueError, match="chosen must be bool"):
        estimates.lay_blocks(chosen.int(), bounds, owner, 8, None)
