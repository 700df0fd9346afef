import itertools
import math

import pytest
import torch

from sparse_dit.index import seen_cells
from sparse_dit.layout import Boxes, TokenLayout, tile_order
from sparse_dit.patterns import GEOMETRY, Blocks, Pattern, Stencil, Stripe, Union, Vertical, Window
from tests.helpers.cases import PATTERN_CASES, SHAPES

GRIDS = [TokenLayout.video(*grid) for grid in ((4, 4, 4), (3, 5, 7), (1, 6, 5), (1, 1, 70))]


def test_every_pattern_has_a_test_case():
    assert SHAPES.keys() == GEOMETRY.keys()


def sees(name, shape, q, k, order):
    """Token by token, straight from the papers' definitions."""
    grid, tile = order.grid, order.tile
    if name == "union":
        names = {v: n for n, v in GEOMETRY.items()}
        return any(sees(names[type(s)], s, q, k, order) for s in shape.of)
    if name in ("dense", "skip"):
        return name == "dense"
    if name == "window":
        for axis, extent in enumerate((shape.frames, shape.rows, shape.columns)):
            if isinstance(extent, tuple):
                extent = math.floor(extent[0] + extent[1] * grid[axis])
            if extent is not None and abs(q[axis] - k[axis]) > extent:
                return False
        return True
    if name == "stripe":
        width = grid[2]
        place = [p and p[0] * width + p[1] for p in (shape.space_width, shape.space_stride)]
        offset = shape.space_offset[0] * width + shape.space_offset[1]
        dt = abs(k[0] - q[0] - shape.time_offset)
        ds = abs(k[1] * width + k[2] - q[1] * width - q[2] - offset)
        time = shape.time_width is None or dt % (shape.time_stride or 10**6) <= shape.time_width - 1
        space = shape.space_width is None or ds % (place[1] or 10**6) <= place[0] - 1
        return time and space
    tile_q, tile_k = ([x // t for x, t in zip(p, tile, strict=True)] for p in (q, k))
    if name == "stencil":
        delta = [b - a for a, b in zip(tile_q, tile_k, strict=True)]
        reach = shape.reach or grid
        delta = [max(-r, min(r, d)) for r, d in zip(reach, delta, strict=True)]
        return any([f, r] == delta[:2] and c <= delta[2] < c + n for f, r, c, n in shape.offsets)
    if name == "tile":
        for axis, count in enumerate((shape.frames, shape.rows, shape.columns)):
            total = -(-grid[axis] // tile[axis])
            count = min(count or total, total)
            first = min(max(tile_q[axis] - count // 2, 0), total - count)
            if not first <= tile_k[axis] < first + count:
                return False
        return True
    cell_q, cell_k = (
        [x * n // g for x, n, g in zip(p, shape.lattice, grid, strict=True)] for p in (q, k)
    )
    flat_q, flat_k = (
        (c[0] * shape.lattice[1] + c[1]) * shape.lattice[2] + c[2] for c in (cell_q, cell_k)
    )
    if name == "vertical":
        return flat_k in shape.cells
    return bool(shape.mask()[flat_q, flat_k])


def token_table(name, shape, order):
    places = order.coordinates.tolist()
    return torch.tensor([[sees(name, shape, q, k, order) for k in places] for q in places])


@pytest.mark.parametrize("layout", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("name", "shape"), [(n, s) for n, shapes in SHAPES.items() for s in shapes], ids=str
)
def test_covers_is_the_definition_rounded_up_to_boxes(name, shape, layout):
    order = tile_order(layout, (2, 2, 3))
    truth = token_table(name, shape, order)
    tokens = Boxes(order.coordinates, order.coordinates)
    assert torch.equal(shape.covers(tokens, tokens, order), truth)
    # tiles and cells of 1 are boxes, so the cover must be exact: any token pair
    tile_of = torch.repeat_interleave(
        torch.arange(len(order.tile_offsets) - 1), order.tile_offsets.diff()
    )
    tiles = len(order.tile_offsets) - 1
    rows = torch.zeros(tiles, truth.shape[1]).index_add_(0, tile_of, truth.float())
    both = torch.zeros(tiles, tiles).index_add_(1, tile_of, rows)
    assert torch.equal(seen_cells(Pattern(shape, (2, 2, 3)), order), both > 0)
    assert torch.equal(seen_cells(Pattern(shape, (2, 2, 3), cell=1), order), rows > 0)
    coarse = seen_cells(Pattern(shape, (2, 2, 3), cell=5), order)
    cells = order.cell_offsets(5)
    owner = torch.repeat_interleave(torch.arange(len(cells) - 1), cells.diff())
    exact = torch.zeros(tiles, len(cells) - 1).index_add_(1, owner, rows) > 0
    assert not (exact & ~coarse).any(), "a cover may see more, never less"


def test_stripe_expresses_the_published_classes():
    layout = TokenLayout.video(4, 6, 6)
    order = tile_order(layout, (1, 1, 1))
    tokens = Boxes(order.coordinates, order.coordinates)
    same_frame = Window(frames=0).covers(tokens, tokens, order)
    assert torch.equal(Stripe(time_width=1).covers(tokens, tokens, order), same_frame)
    same_place = Window(rows=0, columns=0).covers(tokens, tokens, order)
    multi_diagonal = Stripe(space_width=(0, 1)).covers(tokens, tokens, order)
    assert torch.equal(multi_diagonal, same_place)
    every_other = Stripe(time_width=1, time_stride=2).covers(tokens, tokens, order)
    assert every_other.float().mean() == 0.5


def test_stencil_moves_to_another_size():
    stencil = Stencil.from_offsets(torch.tensor([[0, 0, 0], [1, 0, 0], [0, 5, 5]]))
    for layout in (TokenLayout.video(2, 4, 4), TokenLayout.video(8, 40, 40)):
        order = tile_order(layout, (2, 2, 2))
        seen = seen_cells(Pattern(stencil, (2, 2, 2)), order)
        assert (seen.sum(1) >= 1).all()
        assert seen.diagonal().all()


def test_from_offsets_makes_runs():
    stencil = Stencil.from_offsets(torch.tensor([[0, 0, 2], [0, 0, 1], [0, 0, 4], [1, 0, 5]]))
    assert stencil.offsets == ((0, 0, 1, 2), (0, 0, 4, 1), (1, 0, 5, 1))


@pytest.mark.parametrize("pattern", PATTERN_CASES, ids=str)
def test_json_round_trip(pattern):
    data = pattern.to_dict()
    again = Pattern.from_dict(data, pattern.tensors())
    assert again == pattern
    assert hash(again) == hash(pattern)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (None, "a pattern must be an object"),
        ({}, "unknown pattern"),
        ({"name": "Window"}, "unknown pattern"),
        ({"name": ["window"]}, "unknown pattern"),
        ({"name": "window", "frames": True}, "window: frames"),
        ({"name": "window", "frames": -1}, "window: frames"),
        ({"name": "window", "frames": "1"}, "window: frames"),
        ({"name": "window", "frames": 10**30}, "window: frames"),
        ({"name": "window", "rows": [1.0, "0.5"]}, "window: rows"),
        ({"name": "window", "rows": [1.0, math.nan]}, "window: rows"),
        ({"name": "window", "width": 1}, "window: width"),
        ({"name": "dense", "tile": [0, 4, 4]}, "dense: tile"),
        ({"name": "dense", "tile": [4, 4]}, "dense: tile"),
        ({"name": "dense", "far": 1}, "dense: far"),
        ({"name": "dense", "cell": 0}, "dense: cell"),
        ({"name": "stencil", "offsets": [[0, 0, 0]]}, "stencil: offsets"),
        ({"name": "vertical", "lattice": [2, 2, 2], "cells": [8]}, "outside of the lattice"),
        ({"name": "vertical", "lattice": [10**6, 10**6, 10**6], "cells": []}, "at most"),
        ({"name": "blocks", "lattice": [2, 2, 2], "mask": "../../etc/passwd"}, "no tensor"),
        ({"name": "union", "of": [{"name": "dense"}]}, "2 to 16"),
        ({"name": "union", "of": [{"name": "union", "of": []}, {"name": "dense"}]}, "can't hold"),
    ],
)
def test_bad_patterns(data, match):
    with pytest.raises(ValueError, match=match) as error:
        Pattern.from_dict(data)
    assert "\n" not in str(error.value)


def test_bad_shapes_and_masks():
    with pytest.raises(ValueError, match="shape must be one of"):
        Pattern("dense")
    with pytest.raises(ValueError, match="tile"):
        Pattern(Window(), tile=(0, 1, 1))
    with pytest.raises(ValueError, match="takes 8 bytes"):
        Blocks((2, 2, 2), b"123")
    with pytest.raises(ValueError, match="two or more"):
        Union((Window(),))
    with pytest.raises(ValueError, match="outside"):
        Vertical((1, 1, 1), (1,))


def test_a_stencil_goes_on_beyond_what_it_was_found_in():
    """At the size it was found at nothing changes; in a larger video the border stands for all beyond."""
    tile, small, large = (1, 1, 1), TokenLayout.video(2, 3, 3), TokenLayout.video(4, 5, 3)
    offsets = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 2, 1], [0, -1, 0]])
    plain, going = (
        Pattern(Stencil.from_offsets(offsets, reach), tile) for reach in (None, (1, 2, 2))
    )
    order = tile_order(small, tile)
    assert torch.equal(seen_cells(plain, order), seen_cells(going, order))
    order = tile_order(large, tile)
    seen = seen_cells(going, order).view(4, 5, 3, 4, 5, 3)
    for query in itertools.product(range(4), range(5), range(3)):
        for key in itertools.product(range(4), range(5), range(3)):
            delta = [k - q for q, k in zip(query, key, strict=True)]
            kept = [max(-r, min(r, d)) for r, d in zip((1, 2, 2), delta, strict=True)]
            assert bool(seen[query][key]) == (kept in offsets.tolist()), (query, key)
    assert (
        seen[0, 0, 0, 3, 0, 0] and not seen_cells(plain, order).view(seen.shape)[0, 0, 0, 3, 0, 0]
    )


def test_offsets_beyond_a_stencils_reach_are_refused():
    with pytest.raises(ValueError, match=r"within its reach \[1, 1, 1\], got \[0, 0, -2, 2\]"):
        Stencil(((0, 0, -2, 2),), (1, 1, 1))
