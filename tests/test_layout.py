import pytest
import torch

from sparse_dit.layout import Segment, TokenLayout, tile_order
from tests.helpers.cases import LAYOUTS


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("tile", [(2, 2, 2), (4, 3, 5), (None, 1, 1), (1, 2, None), (1, 1, 1)])
def test_tile_order_is_a_permutation_with_contiguous_tiles(layout, tile):
    order = tile_order(layout, tile)
    assert order.order.sort().values.tolist() == list(range(layout.seq_len))
    assert order.tile_offsets[-1] == layout.num_grid
    assert order.global_before + layout.num_grid <= layout.seq_len
    size = torch.tensor(order.tile)
    ids = [tuple(row) for row in (order.coordinates // size).tolist()]
    changes = [i for i in range(1, len(ids)) if ids[i] != ids[i - 1]]
    assert len(set(ids)) == len(order.tile_offsets) - 1
    if ids:
        assert [0, *changes, len(ids)] == order.tile_offsets.tolist()


def test_full_width_tiles_keep_raster_order_and_long_tiles_are_pixel_major():
    layout = TokenLayout.video(3, 4, 5, text_before=2)
    assert tile_order(layout, (1, 2, None)).is_identity
    order = tile_order(layout, (None, 1, 1)).order.tolist()
    assert order[:8] == [0, 1, 2, 22, 42, 3, 23, 43]


def test_text_between_frames_is_sorted_behind_the_video():
    layout = TokenLayout(
        (Segment.global_(2), Segment.grid(1, 1, 2), Segment.global_(1), Segment.grid(1, 1, 2))
    )
    assert tile_order(layout, (1, 1, 2)).order.tolist() == [0, 1, 2, 3, 5, 6, 4]
    assert layout.grid == (2, 1, 2)


@pytest.mark.parametrize("cell", [None, 1, 3, 100])
def test_cells_cut_tiles(cell):
    order = tile_order(TokenLayout.video(3, 5, 7), (2, 2, 2))
    cells = order.cell_offsets(cell)
    assert set(order.tile_offsets.tolist()) <= set(cells.tolist())
    assert cells.diff().min() >= 1
    assert cell is None or cells.diff().max() <= cell
    boxes = order.boxes(cell)
    for i in range(len(boxes)):
        tokens = order.coordinates[cells[i] : cells[i + 1]]
        assert tokens.amin(0).tolist() == boxes.lo[i].tolist()
        assert tokens.amax(0).tolist() == boxes.hi[i].tolist()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_round_trip(layout):
    assert TokenLayout.from_dict(layout.to_dict()) == layout
    assert hash(TokenLayout.from_dict(layout.to_dict())) == hash(layout)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (3, "a layout must be"),
        ({"segments": 3}, "segments must be a list"),
        ({"segments": []}, "at least one segment"),
        ({"segments": [["global"]]}, "a segment must be"),
        ({"segments": [["audio", 3]]}, "a segment must be"),
        ({"segments": [[["global"], 3]]}, "a segment must be"),
        ({"segments": [["global", True]]}, "sizes must be ints"),
        ({"segments": [["global", 0]]}, "sizes must be ints"),
        ({"segments": [["grid", 10**9, 10**9, 10**9]]}, "sizes must be ints"),
        ({"segments": [["grid", 4096, 4096, 4096]]}, "must hold 1 to"),
        ({"segments": [["grid", 2, 2.0, 2]]}, "sizes must be ints"),
        ({"segments": [["global", 1]], "x": 1}, "a layout must be"),
    ],
)
def test_bad_layouts(data, match):
    with pytest.raises(ValueError, match=match) as error:
        TokenLayout.from_dict(data)
    assert "\n" not in str(error.value)


def test_bad_segments():
    with pytest.raises(ValueError, match="can't have 7 tokens"):
        Segment("grid", 7, 1, 2, 3)
    with pytest.raises(ValueError, match="'global' or 'grid'"):
        Segment("audio", 7)
    with pytest.raises(ValueError, match="ints >= 0"):
        Segment.global_(-1)
