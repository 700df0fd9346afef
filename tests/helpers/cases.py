"""Patterns and layouts that the tests of the core run over; the tables can't fall behind GEOMETRY."""

from __future__ import annotations

import torch

from sparse_dit.layout import Segment, TokenLayout
from sparse_dit.patterns import (
    Blocks,
    Dense,
    Pattern,
    Skip,
    SlidingTile,
    Stencil,
    Stripe,
    Union,
    Vertical,
    Window,
)


def _blocks() -> Blocks:
    generator = torch.Generator().manual_seed(3)
    return Blocks.from_mask(torch.rand(12, 12, generator=generator) < 0.3, (2, 3, 2))


SHAPES = {
    "dense": [Dense()],
    "skip": [Skip()],
    "window": [
        Window(),
        Window(frames=0),
        Window(frames=1, rows=1, columns=2),
        Window(rows=(0.0, 0.34), columns=(1.0, 0.0)),
    ],
    "stripe": [
        Stripe(time_width=1),  # spatial
        Stripe(time_width=1, time_stride=2),  # temporal
        Stripe(space_width=(0, 2)),  # multi-diagonal
        Stripe(time_width=1, time_offset=1, space_width=(1, 0)),  # diagonal, shifted
        Stripe(time_width=1, time_stride=3, space_width=(0, 1), space_stride=(1, 0)),  # grid
        Stripe(space_width=(0, 2), space_offset=(1, 1), space_stride=(2, 1)),
    ],
    "stencil": [
        Stencil.from_offsets(
            torch.tensor([[0, 0, 0], [0, 0, 1], [1, 0, -1], [0, 2, 0], [-1, 0, 0]])
        ),
        Stencil(()),
        Stencil(
            ((-1, 0, 0, 1), (0, 0, -1, 3), (0, 1, 1, 1)), (1, 1, 1)
        ),  # goes on beyond its reach
    ],
    "vertical": [Vertical((2, 2, 3), (0, 5, 7)), Vertical((1, 1, 1), ())],
    "tile": [SlidingTile(1, 2, 3), SlidingTile(3, None, 1)],
    "blocks": [_blocks()],
    "union": [Union((Window(0, 1, 1), Vertical((1, 3, 3), (4,)), Stripe(time_width=1)))],
}

FRAMES = [
    {"tile": (2, 2, 2)},
    {"tile": (2, 2, 2), "far": True},
    {"tile": (4, 4, 4), "cell": 5, "far": True},
    {"tile": (None, 1, 2), "cell": 1, "sink_frames": 1},
    {"tile": (1, 2, None), "cell": 3, "far": True, "sink_frames": 1},
]

PATTERN_CASES = [
    Pattern(shape, **frame) for shapes in SHAPES.values() for shape in shapes for frame in FRAMES
]

LAYOUTS = [
    TokenLayout.video(4, 4, 4),
    TokenLayout.video(3, 5, 7),
    TokenLayout.video(3, 5, 7, text_before=6),
    TokenLayout.video(2, 3, 5, text_after=9),
    TokenLayout.video(1, 6, 5, text_before=3, text_after=70),
    TokenLayout(
        (Segment.grid(1, 3, 4), Segment.global_(2), Segment.grid(2, 3, 4), Segment.global_(1))
    ),
    TokenLayout.video(1, 1, 1),
    TokenLayout((Segment.global_(11),)),
]
