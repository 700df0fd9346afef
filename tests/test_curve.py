import itertools
import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from sparse_dit.attention import sparse_attention
from sparse_dit.curve import Curve, curve_path
from sparse_dit.index import build_index, seen_cells
from sparse_dit.layout import Segment, TokenLayout, tile_order
from sparse_dit.patterns import Pattern, Skip, SlidingTile, Stencil, Vertical, Window
from sparse_dit.search.cells import cell_table
from sparse_dit.search.seen import density, seen_tiles

GOLDEN = Path(__file__).parent / "golden" / "curves.json"
CURVES = [
    Curve("frame"),
    Curve("frame", 4, 2),
    Curve("frame", 8, None),
    Curve("video", 16),
    Curve("video", None),
]
LAYOUTS = [
    TokenLayout.video(4, 4, 4),
    TokenLayout.video(3, 5, 7, text_before=6, text_after=2),
    TokenLayout.video(1, 1, 1),
    TokenLayout.video(1, 6, 5),
    TokenLayout(
        (Segment.grid(1, 3, 4), Segment.global_(2), Segment.grid(2, 4, 2), Segment.global_(1))
    ),
    TokenLayout((Segment.global_(11),)),
]


def steps(grid):
    """How far, on each axis, the curve goes from one token to the next, `[n - 1, 3]`."""
    places = torch.stack(torch.unravel_index(curve_path(grid), grid), 1)
    return places.diff(dim=0).abs()


@pytest.mark.parametrize("frames", [1, 2, 3, 6])
def test_a_curve_visits_every_token_once(frames):
    for height, width in itertools.product(range(1, 12), repeat=2):
        path = curve_path((frames, height, width))
        assert path.sort().values.tolist() == list(range(frames * height * width))
        assert path[0] == 0


def test_even_sizes_step_to_direct_neighbours():
    for grid in itertools.product((2, 4, 6, 10), repeat=3):
        assert (steps(grid).sum(1) == 1).all(), grid
    for height, width in itertools.product(range(2, 33, 2), repeat=2):
        assert (steps((1, height, width)).sum(1) == 1).all()


def test_in_a_frame_only_an_odd_length_and_even_breadth_take_a_diagonal_step():
    for height, width in itertools.product(range(1, 26), repeat=2):
        far = steps((1, height, width)).sum(1)
        diagonals = 1 if max(height, width) % 2 and not min(height, width) % 2 else 0
        assert (far > 1).sum() == diagonals
        assert not diagonals or steps((1, height, width)).max() == 1


def test_in_odd_videos_the_steps_that_are_no_neighbours_are_few_and_short():
    for grid in ((3, 5, 7), (5, 9, 9), (9, 13, 15), (21, 15, 11)):
        far = steps(grid)
        assert (far.sum(1) > 1).float().mean() < 0.05
        assert far.max() <= 3


@pytest.mark.parametrize("grid", [(1, 16, 16), (1, 30, 52), (8, 12, 12), (21, 30, 52)], ids=str)
def test_stretches_are_more_compact_than_the_rasters(grid):
    """By the mean squared distance of tokens from the middle of their stretch of 64."""

    def spread(path):
        places = torch.stack(torch.unravel_index(path, grid), 1).double()
        return sum(
            part.var(0, correction=0).sum().item() * len(part) for part in places.split(64)
        ) / len(places)

    raster = spread(torch.arange(grid[0] * grid[1] * grid[2]))
    assert spread(curve_path(grid)) < 0.6 * raster


def test_the_curve_does_not_change():
    for grid, path in json.loads(GOLDEN.read_text()).items():
        assert curve_path(tuple(map(int, grid.split("x")))).tolist() == path


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("curve", CURVES, ids=str)
def test_order_is_a_permutation_along_the_curve(layout, curve):
    order = tile_order(layout, curve)
    assert order.order.sort().values.tolist() == list(range(layout.seq_len))
    assert order.tile_offsets[-1] == layout.num_grid
    size = torch.tensor(order.tile)
    ids = [tuple(row) for row in (order.coordinates // size).tolist()]
    assert len(set(ids)) == len(order.tile_offsets) - 1
    assert ids == sorted(ids)
    if layout.num_grid == layout.seq_len and curve == Curve("video", None):
        assert torch.equal(order.order, curve_path(layout.grid))


def test_every_frame_has_the_same_curve():
    layout = TokenLayout.video(3, 5, 8, text_before=2)
    order = tile_order(layout, Curve("frame", None)).order[2:] - 2
    frames = order.view(3, 40) - torch.arange(3)[:, None] * 40
    assert (frames == curve_path((1, 5, 8))).all()


def test_a_window_of_columns_is_a_band_along_the_curve():
    layout = TokenLayout.video(2, 4, 6)
    for curve, frames in ((Curve("video", 1), None), (Curve("frame", 1), 0)):
        order = tile_order(layout, curve)
        seen = seen_cells(Pattern(Window(frames=frames, columns=5), curve), order)
        place = torch.arange(48)
        near = (place[:, None] - place).abs() <= 5
        if frames == 0:
            near &= place[:, None] // 24 == place // 24
        assert torch.equal(seen, near)


@pytest.mark.parametrize("curve", CURVES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Window(frames=1, columns=(0.0, 0.2)),
        Stencil(((-1, 0, 0, 1), (0, 0, -1, 3))),
        SlidingTile(None, 1, 2),
        Vertical((1, 1, 4), (2,)),
        Skip(),
    ],
    ids=str,
)
def test_attention_along_a_curve_is_that_of_its_mask(curve, shape):
    layout = TokenLayout.video(3, 5, 7, text_before=3, text_after=2)
    pattern = Pattern(shape, curve)
    order = tile_order(layout, curve)
    tokens = torch.repeat_interleave(
        torch.arange(len(order.tile_offsets) - 1), order.tile_offsets.diff()
    )
    mask = torch.ones(110, 110, dtype=torch.bool)
    video = order.order[3 : 3 + layout.num_grid]
    seen = seen_cells(pattern, order)[tokens][:, tokens]
    mask[video[:, None], video] = seen
    q, k, v = torch.randn(3, 1, 1, 110, 8, generator=torch.Generator().manual_seed(0))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    for backend in ("reference", "gather", "cpu"):
        index = build_index([pattern], layout)
        sparse = sparse_attention(q, k, v, index, backend=backend)
        assert torch.allclose(sparse, dense, atol=2e-5), backend


@pytest.mark.parametrize("far", [False, True])
def test_the_search_prices_and_scores_curves(far):
    layout = TokenLayout.video(4, 6, 6, text_after=5)
    for curve in CURVES:
        pattern = Pattern(Stencil(((0, 0, -1, 3),)), curve, far=far)
        index = build_index([pattern], layout)
        assert density(pattern, layout) == pytest.approx(index.density)
        order = tile_order(layout, curve)
        assert torch.equal(seen_tiles(pattern, layout), seen_cells(pattern, order))
        table = cell_table(layout, curve)
        assert len(table.tokens) == len(order.tile_offsets) - 1


def test_a_pattern_along_a_curve_moves_to_another_size():
    pattern = Pattern(Window(columns=(0.0, 0.05)), Curve("video", 8), far=True)
    for layout in (TokenLayout.video(4, 8, 8), TokenLayout.video(5, 13, 9)):
        index = build_index([pattern], layout)
        assert 0.1 < index.density < 0.4
        assert not index.entries[0].is_dense


@pytest.mark.parametrize("curve", CURVES, ids=str)
def test_round_trip(curve):
    pattern = Pattern(Window(columns=3), curve, far=True)
    assert Pattern.from_dict(json.loads(json.dumps(pattern.to_dict()))) == pattern
    assert pattern.version == 2 and str(curve) in str(pattern)


def test_what_a_curve_can_not_be():
    with pytest.raises(ValidationError, match="'frame' or 'video'"):
        Curve("hilbert")
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Curve("frame", 0)
    with pytest.raises(ValueError, match="frames must be 1 for a curve through the video, got 2"):
        Curve("video", 64, 2)
    with pytest.raises(ValueError, match="sink_frames must be 0 along a curve through the video"):
        Pattern(Window(), Curve("video"), sink_frames=1)
    with pytest.raises(ValueError, match="sizes >= 1"):
        curve_path((0, 1, 1))
