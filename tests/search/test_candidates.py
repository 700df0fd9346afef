"""Planted heads: discovery finds what a head looks at, and scoring gives it an error near zero."""

import itertools
import json
import math

import pytest
import torch

from sparse_dit.index import build_index
from sparse_dit.layout import Segment, TokenLayout
from sparse_dit.patterns import Pattern, Stencil, Vertical, Window
from sparse_dit.search.candidates import DENSE, all_candidates, fixed, found, tilings
from sparse_dit.search.cells import cell_table, sample_rows, sampled_rows
from sparse_dit.search.nested import Candidates
from sparse_dit.search.seen import density, seen_tiles
from sparse_dit.search.statistics import discover, empty_statistics, of_head, score_all
from tests.helpers.search_cases import cell_sums

LAYOUT = TokenLayout.video(8, 16, 16, text_after=4)
CUBE = (4, 4, 4)
ODD_LAYOUTS = [
    TokenLayout.video(1, 12, 20),
    TokenLayout.video(1, 1, 37),
    TokenLayout.video(5, 7, 9, text_before=6),
    TokenLayout.video(70, 3, 4),
    TokenLayout.video(2, 2, 3, text_after=5),
    TokenLayout.video(1, 1, 1, text_before=1),
    TokenLayout((Segment.grid(1, 3, 9), Segment.global_(2), Segment.grid(2, 8, 4))),
]


def _codes(count, dim=64):
    """Nearly orthogonal unit vectors, one for each place."""
    codes = torch.randn(count, dim, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(codes, dim=1)


def _head(sees, layout=LAYOUT, tile=CUBE, strength=12.0):
    """q, k, v `[N, D]` of a head whose tiles look at the tiles that bool `sees` [T, T] says."""
    table = cell_table(layout, tile)
    code = _codes(len(table.tokens))
    owner = table.cell_of_token.clamp_min(0)
    k = code[owner] * strength
    q = (sees.float() @ code)[owner] * strength
    if len(table.global_tokens):
        k[table.global_tokens] = 0
    generator = torch.Generator().manual_seed(1)
    return q, k, torch.randn(layout.seq_len, 16, generator=generator)


def _offsets(*offsets, layout=LAYOUT, tile=CUBE):
    """bool [T, T]: tiles at the given offsets."""
    place = cell_table(layout, tile).place
    delta = place[None] - place[:, None]
    return torch.stack([(delta == torch.tensor(o)).all(-1) for o in offsets]).any(0)


def _searched(q, k, v, layout=LAYOUT, rows=96, scale=1.0):
    """Candidates found on one sample of rows, and their relative squared errors on another."""
    statistics, scores = {}, None
    one = q[None], k[None], v[None]
    for seed in (0, 1):
        sample = sample_rows(layout, rows, torch.Generator().manual_seed(seed))
        sums = {
            tile: cell_sums(*one, sample, cell_table(layout, tile), scale, layout.seq_len)
            for tile in tilings(layout)
        }
        if seed == 0:
            for tile, part in sums.items():
                of_layer = empty_statistics(layout, [tile], 1)[tile]
                discover(of_layer, range(1), part, layout, tile)
                statistics[tile] = of_head(of_layer, 0)
        else:
            candidates = all_candidates(statistics, layout)
            sampled = sampled_rows(*one, sample, scale, layout.seq_len)
            error, _, _, norm = score_all(sampled, candidates, layout)
            scores = error / norm
    return statistics, candidates, scores


def _found(statistics, tile, layout):
    return Candidates(found(statistics[tile], tile, layout))


def _cheapest_good(candidates, errors, layout=LAYOUT, limit=1e-3):
    return min(density(p, layout) for p, e in zip(candidates, errors, strict=True) if e < limit)


def test_planted_offsets_are_recovered():
    planted = [(0, 0, 0), (1, 0, -1), (-1, 2, 0)]
    sees = _offsets(*planted)
    statistics, candidates, errors = _searched(*_head(sees))
    stencils = [p for p in _found(statistics, CUBE, LAYOUT) if isinstance(p.shape, Stencil)]
    first = next(p for p in stencils if sum(run[3] for run in p.shape.offsets) >= 3)
    members = {(f, r, c + i) for f, r, c, n in first.shape.offsets for i in range(n)}
    assert set(planted) <= members
    assert _cheapest_good(candidates, errors) < 2.5 * sees.float().mean() + 0.05


def test_planted_columns_are_recovered():
    columns = [3, 17]
    sees = torch.zeros(32, 32, dtype=torch.bool)
    sees[:, columns] = True
    statistics, candidates, errors = _searched(*_head(sees))
    vertical = [p for p in _found(statistics, CUBE, LAYOUT) if isinstance(p.shape, Vertical)]
    assert all(
        set(columns[:1]) & set(p.shape.cells) or columns[1] in p.shape.cells for p in vertical
    )
    assert any(set(columns) == set(p.shape.cells) for p in vertical)
    assert _cheapest_good(candidates, errors) < 0.1


def test_a_head_of_its_own_frame_gets_it():
    layout, tile = TokenLayout.video(8, 8, 16), (1, 8, 8)
    place = cell_table(layout, tile).place
    sees = place[:, None, 0] == place[None, :, 0]
    _, candidates, errors = _searched(*_head(sees, layout, tile), layout)
    assert _cheapest_good(candidates, errors, layout) < 0.2  # 1/8 and the pooled rest


@pytest.mark.parametrize("axis", [1, 2], ids=["column", "row"])
def test_a_head_of_its_own_line_in_all_frames_gets_it(axis):
    layout = TokenLayout.video(8, 16, 16)
    tile = tilings(layout)[1 + axis]
    assert tile[0] is None and tile[axis] == 8 and tile[3 - axis] == 1
    place = cell_table(layout, tile).place[:, 3 - axis]
    sees = place[:, None] == place[None]  # 1/16 of the tokens
    _, candidates, errors = _searched(*_head(sees, layout, tile), layout)
    assert _cheapest_good(candidates, errors, layout) < 0.1


def test_a_head_of_its_own_place_in_all_frames_gets_it():
    layout = TokenLayout.video(8, 16, 16)
    tile = tilings(layout)[-1]
    assert tile[0] is None
    sees = torch.eye(len(cell_table(layout, tile).tokens), dtype=torch.bool)
    _, candidates, errors = _searched(*_head(sees, layout, tile), layout)
    assert _cheapest_good(candidates, errors, layout) < 0.06


def test_a_uniform_head_is_seen_by_the_far_field_alone():
    q = torch.zeros(LAYOUT.seq_len, 8)
    v = torch.randn(LAYOUT.seq_len, 8, generator=torch.Generator().manual_seed(0))
    _, candidates, errors = _searched(q, q, v)
    assert errors[[kind.far for kind in candidates.kinds]].max() < 1e-8  # means of means
    assert _cheapest_good(candidates, errors) < 0.03


@pytest.mark.parametrize("layout", [LAYOUT, *ODD_LAYOUTS], ids=str)
def test_every_head_has_the_same_number_of_candidates_and_they_round_trip(layout):
    counts, every = set(), []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(layout.seq_len, 8, generator=generator) for _ in range(3))
        _, candidates, errors = _searched(q, k, v, layout, rows=16)
        assert list(candidates) == list(_searched(q, k, v, layout, rows=16)[1])  # deterministic
        assert candidates[0] == DENSE and errors[0] == 0
        assert errors.isfinite().all()
        counts.add(len(candidates))
        every += candidates
    assert len(counts) == 1
    for pattern in dict.fromkeys(every):
        text = json.dumps(pattern.to_dict())
        assert Pattern.from_dict(json.loads(text), pattern.tensors()) == pattern
    some = every[:: max(1, len(every) // 12)]
    assert build_index(some, layout).head_density.tolist() == pytest.approx(
        [density(p, layout) for p in some]
    )


@pytest.mark.parametrize("layout", [LAYOUT, *ODD_LAYOUTS], ids=str)
def test_stencils_stay_within_their_budgets(layout):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(layout.seq_len, 8, generator=generator) for _ in range(3))
    statistics, _, _ = _searched(q, k, v, layout)
    for tile in tilings(layout):
        counts = cell_table(layout, tile).counts.tolist()
        patterns = _found(statistics, tile, layout)
        for far in (False, True):
            sizes = [
                sum(run[3] for run in p.shape.offsets)
                for p in patterns
                if isinstance(p.shape, Stencil) and p.far is far
            ]
            assert sizes == sorted(sizes) and sizes[0] >= 1
            assert sizes[-1] <= math.prod(2 * n - 1 for n in counts)


def test_tiles_hold_about_as_many_tokens_as_a_group():
    for layout in (LAYOUT, *ODD_LAYOUTS):
        for frames, rows, columns in tilings(layout):
            frames = layout.grid[0] if frames is None else frames
            assert frames * rows * columns <= max(64, layout.grid[0])


@pytest.mark.parametrize("layout", [LAYOUT, *ODD_LAYOUTS, TokenLayout.video(2, 8, 8)], ids=str)
def test_fixed_candidates_differ_at_the_calibrated_size(layout):
    known = [(p.tile, p.far, seen_tiles(p, layout)) for p in fixed(layout)]
    assert len(known) >= 2 and not any(seen.all() for _, _, seen in known)
    for (tile, far, seen), (other, with_far, others) in itertools.combinations(known, 2):
        assert (tile, far) != (other, with_far) or not torch.equal(seen, others)


def test_what_limits_nothing_at_the_calibrated_size_is_no_candidate():
    eight, nine = ({p.shape for p in fixed(TokenLayout.video(frames, 24, 24))} for frames in (8, 9))
    assert Window(None, 4, 4) in eight and Window(0, None, None) in eight
    assert not eight & {Window(2, 4, 4), Window(2, None, None), Window()}
    assert {Window(None, 4, 4), Window(2, 4, 4), Window(2, None, None)} <= nine
