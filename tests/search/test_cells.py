"""What the search computes from sampled rows against dense softmax and the reference backend."""

import dataclasses
import math

import pytest
import torch

from sparse_dit import sparse_attention
from sparse_dit.curve import Curve
from sparse_dit.index import build_index, pattern_index
from sparse_dit.layout import TokenLayout, tile_order
from sparse_dit.patterns import Blocks, Pattern, Stencil
from sparse_dit.search.candidates import DENSE, fixed
from sparse_dit.search.cells import cell_table, sample_rows, sampled_rows
from sparse_dit.search.nested import Candidates
from sparse_dit.search.seen import density, seen_tiles
from sparse_dit.search.statistics import score_all
from tests.helpers.cases import LAYOUTS, PATTERN_CASES
from tests.helpers.kernel_cases import until
from tests.helpers.search_cases import cell_sums

VIDEOS = [layout for layout in LAYOUTS if layout.num_grid]
TILES = [(2, 2, 2), (4, 4, 4), (1, 2, 3), (None, 1, 2)]
SCALE = 0.3


def _heads(layout, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(layout.seq_len, dim, generator=generator) for _ in range(3)]


def _rows(layout, count=40):
    return sample_rows(layout, count, torch.Generator().manual_seed(1))


def _sizes(layout, tile):
    return [n if t is None else min(t, n) for t, n in zip(tile, layout.grid, strict=True)]


def _regular(layout, tile):
    table = cell_table(layout, tile)
    return table.counts.prod() == len(table.tokens)


def _padded(layout):
    """Numbers of valid tokens: all, and all but some of the text after the video."""
    last = layout.segments[-1]
    cut = last.length // 2 if last.kind == "global" and layout.num_grid else 0
    return {layout.seq_len, layout.seq_len - cut}


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("layout", VIDEOS, ids=str)
def test_sums_are_those_of_the_dense_softmax(layout, tile):
    q, k, v = _heads(layout)
    rows, table = _rows(layout), cell_table(layout, tile)
    for valid in _padded(layout):
        sums = cell_sums(q, k, v, rows, table, SCALE, valid)
        logits = q[rows].double() @ k.double().T * SCALE
        logits[:, valid:] = -torch.inf
        p = logits.softmax(1)
        close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
        torch.testing.assert_close(sums.out, p @ v.double(), **close)
        for cell in range(len(table.tokens)):
            tokens = (table.cell_of_token == cell).nonzero()[:, 0]
            part = p[:, tokens]
            torch.testing.assert_close(sums.mass[:, cell], part.sum(1), **close)
            torch.testing.assert_close(sums.exact[:, cell], part @ v[tokens].double(), **close)
            mean = q[rows].double() @ k[tokens].double().mean(0) * SCALE
            pooled = (mean - logits.logsumexp(1)).exp() * len(tokens)
            torch.testing.assert_close(sums.pooled[:, cell], pooled, **close)
            far = pooled[:, None] * v[tokens].double().mean(0)
            torch.testing.assert_close(sums.far_output[:, cell], far, **close)
        text = p[:, table.global_tokens].sum(1)
        torch.testing.assert_close(sums.global_mass, text, **close)
        torch.testing.assert_close(
            sums.mass.sum(1) + sums.global_mass, torch.ones_like(text), **close
        )


@pytest.mark.parametrize("layout", VIDEOS, ids=str)
def test_every_token_is_in_one_cell_or_is_text(layout):
    for tile in TILES:
        table = cell_table(layout, tile)
        owned = table.tokens[table.real.bool()]
        assert sorted([*owned.tolist(), *table.global_tokens.tolist()]) == list(
            range(layout.seq_len)
        )
        assert table.cell_of_token[table.global_tokens].eq(-1).all()
        cell = torch.arange(len(table.tokens))[:, None].expand_as(table.tokens)
        assert table.cell_of_token[table.tokens].equal(cell)
        assert (table.place >= 0).all() and (table.place < table.counts).all()
        assert len(table.place.unique(dim=0)) == len(table.place)


@pytest.mark.parametrize("far", [False, True], ids=["drop", "far"])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("layout", VIDEOS, ids=str)
def test_outputs_are_what_the_reference_backend_computes(layout, tile, far):
    q, k, v = _heads(layout)
    rows, table = _rows(layout), cell_table(layout, tile)
    lattice = tuple(table.counts.tolist())
    places = math.prod(lattice)
    for seed in range(3):
        mask = torch.rand(places, places, generator=torch.Generator().manual_seed(seed)) < 0.4
        pattern = Pattern(Blocks.from_mask(mask, lattice), tile, far=far)
        seen = seen_tiles(pattern, layout)  # not the mask where tiles at the border are smaller
        if not any(n % t for n, t in zip(layout.grid, _sizes(layout, tile), strict=True)):
            assert _regular(layout, tile) and seen.equal(mask)
        index = build_index([pattern], layout)
        for valid in _padded(layout):
            sums = cell_sums(q, k, v, rows, table, SCALE, valid)
            ours = sums.outputs(seen[sums.cell][None], far)[0]
            stop = until(index, valid)
            parts = [x[None, None] for x in (q, k, v)]
            theirs = sparse_attention(
                *parts, index, row_stop=stop, scale=SCALE, backend="reference"
            )[0, 0, rows]
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", [1, 3, 16, 64, 500])
@pytest.mark.parametrize("tile", [*TILES[:2], Curve("frame", tokens=10), Curve("video")], ids=str)
@pytest.mark.parametrize("layout", VIDEOS, ids=str)
def test_finer_pools_are_what_the_reference_backend_computes(layout, tile, pool):
    q, k, v = _heads(layout)
    rows, table = _rows(layout), cell_table(layout, tile)
    reach = int(table.counts.max()) // 2
    pattern = Pattern(Stencil(((0, 0, -reach, reach + 1),)), tile, far=True, pool=pool)
    sums = sampled_rows(q, k, v, rows, SCALE, layout.seq_len).by_cells(table, pool)
    ours = sums.outputs(seen_tiles(pattern, layout)[sums.cell][None], True)[0]
    index = build_index([pattern], layout)
    parts = [x[None, None] for x in (q, k, v)]
    theirs = sparse_attention(*parts, index, scale=SCALE, backend="reference")[0, 0, rows]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert density(pattern, layout) == pytest.approx(index.density, rel=1e-6)


def test_a_row_that_sees_nothing_is_zero_like_in_the_kernels():
    layout = TokenLayout.video(2, 4, 4)
    q, k, v = _heads(layout)
    sums = cell_sums(q, k, v, _rows(layout), cell_table(layout, (2, 2, 2)), SCALE, 32)
    none = torch.zeros(1, len(sums.out), sums.mass.shape[1], dtype=torch.bool)
    assert sums.outputs(none, far=False).eq(0).all()


@pytest.mark.parametrize("far", [False, True], ids=["drop", "far"])
def test_benefit_is_the_first_order_error_of_one_cell(far):
    layout = TokenLayout.video(4, 6, 6, text_after=3)
    q, k, v = (x / 4 for x in _heads(layout))
    sums = cell_sums(q, k, v, _rows(layout), cell_table(layout, (2, 2, 2)), SCALE, layout.seq_len)
    cells = sums.mass.shape[1]
    for cell in range(0, cells, 5):
        seen = torch.ones(1, len(sums.out), cells, dtype=torch.bool)
        seen[..., cell] = False
        error = (sums.outputs(seen, far)[0] - sums.out).square().sum(-1)
        relative = error / sums.out.square().sum(-1)
        torch.testing.assert_close(sums.benefit(far)[:, cell], relative, rtol=0.15, atol=1e-6)


@pytest.mark.parametrize("layout", VIDEOS, ids=str)
def test_score_agrees_with_running_each_candidate(layout):
    q, k, v = _heads(layout)
    rows = _rows(layout)
    candidates = Candidates([DENSE, *fixed(layout)])
    sampled = sampled_rows(q[None], k[None], v[None], rows, SCALE, layout.seq_len)
    error, square, recall, norm = score_all(sampled, candidates, layout)
    assert error[0] == square[0] == 0 and recall[0] == len(rows)
    dense = sparse_attention(
        *(x[None, None] for x in (q, k, v)), build_index([DENSE], layout), scale=SCALE
    )
    torch.testing.assert_close(norm, dense[0, 0, rows].square().sum(), rtol=1e-4, atol=1e-6)
    for place in range(1, len(candidates), 4):
        index = build_index([candidates[place]], layout)
        out = sparse_attention(
            *(x[None, None] for x in (q, k, v)), index, scale=SCALE, backend="reference"
        )
        wrong = (out - dense)[0, 0, rows].square().sum(-1)
        torch.testing.assert_close(error[place], wrong.sum(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(square[place], wrong.square().sum(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout", VIDEOS, ids=str)
def test_density_is_the_index_density(layout):
    whole = [dataclasses.replace(p, cell=None) for p in PATTERN_CASES]
    for pattern in dict.fromkeys([DENSE, *fixed(layout), *whole]):
        expected = pattern_index(pattern, layout).density
        assert density(pattern, layout) == pytest.approx(expected, rel=1e-12), str(pattern)


@pytest.mark.parametrize("layout", VIDEOS, ids=str)
@pytest.mark.parametrize("count", [1, 7, 64, 1000])
def test_sampled_rows_are_distinct_video_tokens(layout, count):
    rows = _rows(layout, count)
    assert len(rows) == min(count, layout.num_grid)
    assert rows.equal(rows.unique())  # distinct and sorted
    assert not torch.isin(rows, cell_table(layout, (4, 4, 4)).global_tokens).any()
    assert rows.equal(_rows(layout, count))  # the same seed, the same rows


def test_sampled_rows_are_spread_over_the_video():
    layout = TokenLayout.video(8, 16, 16, text_before=5)
    order = tile_order(layout, (4, 4, 4))
    place = torch.empty(layout.seq_len, dtype=torch.int64)
    place[order.order] = torch.arange(layout.seq_len)
    for seed in range(5):
        rows = sample_rows(layout, 64, torch.Generator().manual_seed(seed))
        stretches = (place[rows] - 5) // 32  # 2048 tokens, 64 equal stretches
        assert stretches.sort().values.equal(torch.arange(64))
    other = sample_rows(layout, 64, torch.Generator().manual_seed(9))
    assert not rows.equal(other)
