"""Indices of neighbouring tokens, which the Gluon kernel takes, at random and from patterns."""

from __future__ import annotations

import itertools

import torch

from sparse_dit.entry import PatternIndex
from sparse_dit.index import SparseIndex, build_index
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Skip, SlidingTile, Union, Vertical, Window
from tests.helpers.kernel_cases import entry

LAYOUT = TokenLayout.video(4, 8, 12, text_before=3, text_after=5)
FRAMES, HALVES = (1, None, None), (1, 4, None)
PATTERNS = [
    Pattern(Dense()),
    Pattern(Window(frames=0), FRAMES),
    Pattern(Window(frames=1), FRAMES, far=True),
    Pattern(Window(0, 0, 0), HALVES, far=True),
    Pattern(Window(frames=0), FRAMES, far=True, pool=3),
    Pattern(SlidingTile(1, 1, 1), HALVES),
    Pattern(Skip(), FRAMES),
    Pattern(Union((Window(frames=0), Vertical((1, 3, 4), (2,)))), HALVES, sink_frames=1),
]


def patterns_index(*places: int) -> SparseIndex:
    """The index of some of `PATTERNS`; of all without any."""
    return build_index([PATTERNS[place] for place in places or range(len(PATTERNS))], LAYOUT)


def random_entry(
    tokens: int, seed: int, *, moved: bool = False, far: bool = False, block: int = 100
) -> PatternIndex:
    """Groups that see some runs, one of them nothing.

    Args:
        tokens: Queries and keys.
        seed: Of the draw.
        moved: Whether pieces of tokens change places.
        far: Whether there are pooled keys.
        block: The mean length of a run.
    """
    draw = torch.Generator().manual_seed(seed)

    def cut(length: int, low: int, high: int) -> list[int]:
        sizes = torch.randint(low, high, (length // low + 1,), generator=draw)
        places = [x for x in sizes.cumsum(0).tolist() if x < length]
        return [0, *places, length]

    def sizes(low: int, high: int) -> list[int]:
        return torch.tensor(cut(tokens, low, high)).diff().tolist()

    groups = sizes(40, 129)
    keys = []
    for group in range(len(groups)):
        bounds = cut(tokens, block // 2, block * 3 // 2)
        first = int(torch.randint(2, (), generator=draw))
        spans = list(itertools.pairwise(bounds))[first::2]
        keys.append([] if group == 1 else [x for a, b in spans for x in range(a, b)])
    cells = pooled = None
    if far:
        cells = cut(tokens, 1, 5)
        count = len(cells) - 1
        chance = torch.rand(len(groups), count, generator=draw)
        pooled = [
            row.nonzero()[:, 0] for row in chance < torch.rand(len(groups), 1, generator=draw)
        ]
        pooled[1] = pooled[1][:0]
    order = None
    if moved:
        pieces = torch.arange(tokens).split(sizes(60, 140))
        order = torch.cat([pieces[i] for i in torch.randperm(len(pieces), generator=draw).tolist()])
    return entry(tokens, groups, keys, q_order=order, k_order=order, cells=cells, pooled=pooled)
