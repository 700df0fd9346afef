"""Which keys each query sees in a benchmark: random blocks, and patterns at a density.

Random blocks are what kernels are compared with elsewhere; the other lists are real patterns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..index import FarField, PatternIndex, SparseIndex, build_index
from ..layout import TokenLayout
from ..patterns import Dense, Pattern, Stencil, Stripe, Vertical

BLOCK = 64  # query rows and keys of a block, and keys of a pooled cell
TILE = (4, 4, 4)
LANES = 16  # rows that a CPU kernel handles together


def build(pattern: str, layout: TokenLayout, heads: int, density: float, seed: int) -> SparseIndex:
    """Index of a list in `LISTS` for `heads` heads.

    Args:
        pattern: A name in `LISTS`.
        layout: Video of the sequence; block lists ignore its grid.
        heads: H; random blocks differ from head to head, patterns don't.
        density: Wanted share of the pairs; the index has its own, rounded to what the list can be.
        seed: The seed of random blocks.

    Raises:
        ValueError: If the pattern is unknown, or the density isn't in (0, 1].
    """
    if pattern not in LISTS:
        raise ValueError(f"pattern must be one of {', '.join(LISTS)}, got {pattern!r}")
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {density}")
    return LISTS[pattern](layout, heads, density, seed)


def dense(layout: TokenLayout, heads: int) -> SparseIndex:
    """Every query sees every key, as in a plan's dense heads."""
    return build_index([Pattern(Dense())] * heads, layout)


def dense_blocks(layout: TokenLayout, heads: int) -> SparseIndex:
    """Every query sees every key, with a group (and so a row of block mass) for each 64 queries."""
    blocks = -(-layout.seq_len // BLOCK)
    entry = from_blocks(torch.ones(blocks, blocks, dtype=torch.bool), layout.seq_len)
    return SparseIndex((entry,), (0,) * heads)


def random_blocks(
    layout: TokenLayout, heads: int, density: float, seed: int, *, far: bool = False
) -> SparseIndex:
    """Every block of queries sees its own block of keys and equally many random others."""
    n = layout.seq_len
    blocks = -(-n // BLOCK)
    count = min(blocks, max(1, round(density * blocks)))
    generator = torch.Generator().manual_seed(seed)
    entries = []
    for _ in range(heads):
        score = torch.rand(blocks, blocks, generator=generator).fill_diagonal_(2)
        mask = torch.zeros(blocks, blocks, dtype=torch.bool)
        mask.scatter_(1, score.topk(count, dim=1).indices, True)
        entries.append(from_blocks(mask, n, far=far))
    return SparseIndex(tuple(entries), tuple(range(heads)))


def random_blocks_with_far(
    layout: TokenLayout, heads: int, density: float, seed: int
) -> SparseIndex:
    """The same random blocks, and all others as one pooled key each."""
    return random_blocks(layout, heads, density, seed, far=True)


def columns(layout: TokenLayout, heads: int, density: float, seed: int) -> SparseIndex:
    """All queries see the same random single keys."""
    n = layout.seq_len
    count = min(n, max(1, round(density * n)))
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randperm(n, generator=generator)[:count].sort().values
    shape = Vertical(layout.grid, tuple(cells.tolist()))
    return build_index([Pattern(shape, (None, None, None), cell=1)] * heads, layout)


def diagonals(layout: TokenLayout, heads: int, density: float, seed: int) -> SparseIndex:
    """Every query sees pixels near its own in all frames: the width that comes nearest the density."""
    pixels = layout.grid[1] * layout.grid[2]
    return multi_diagonal(layout, heads, max(0, round((density * pixels - 1) / 2)))


def multi_diagonal(layout: TokenLayout, heads: int, reach: int) -> SparseIndex:
    """Every query sees the pixels up to `reach` away in raster order, in all frames.

    Tokens are sorted pixel by pixel, as many pixels to a group as fill the rows of a CPU kernel; so the
    keys of a group are one run.
    """
    frames, _, width = layout.grid
    tile = (None, 1, min(width, -(-LANES // frames)))
    return build_index([Pattern(Stripe(space_width=(0, reach + 1)), tile)] * heads, layout)


def tiles(layout: TokenLayout, heads: int, density: float, seed: int) -> SparseIndex:
    """Every 4x4x4 tile of tokens sees its nearest tiles: tokens are reordered."""
    counts = torch.tensor([-(-n // t) for n, t in zip(layout.grid, TILE, strict=True)])
    offsets = torch.cartesian_prod(*(torch.arange(1 - n, n) for n in counts.tolist()))
    ranked = offsets[offsets.square().sum(1).argsort(stable=True)]
    pairs = (counts - ranked.abs()).prod(1).double().cumsum(0) / counts.prod().double() ** 2
    keep = ranked[: max(1, int((pairs <= density).sum()))]
    return build_index([Pattern(Stencil.from_offsets(keep), TILE)] * heads, layout)


LISTS = {
    "blocks": random_blocks,
    "far": random_blocks_with_far,
    "columns": columns,
    "diagonals": diagonals,
    "tiles": tiles,
}


def from_blocks(mask: Tensor, n: int, *, far: bool = False) -> PatternIndex:
    """Index of a bool block mask `[G, G]` over `n` tokens in their order, blocks of 64.

    Args:
        mask: Which block of keys each block of queries sees.
        n: Tokens; the last block may be short.
        far: Whether blocks that aren't seen are pooled keys.
    """
    bounds = (torch.arange(len(mask) + 1) * BLOCK).clamp_max(n)
    first, count, offsets = _runs(mask)
    runs = torch.stack([bounds[first], bounds[first + count] - bounds[first]], 1).int()
    field = None
    if far:
        first, count, far_offsets = _runs(~mask)
        field = FarField(bounds.int(), far_offsets, torch.stack([first, count], 1).int())
    return PatternIndex(n, n, None, None, bounds.int(), offsets, runs, field)


def _runs(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of true in the rows of bool `[G, C]`: first, count, and int32 offsets by row."""
    edges = pad(mask, (1, 1)).to(torch.int8).diff(dim=1)
    row, first = (edges == 1).nonzero(as_tuple=True)
    count = (edges == -1).nonzero(as_tuple=True)[1] - first
    offsets = pad(torch.bincount(row, minlength=len(mask)).cumsum(0), (1, 0))
    return first, count, offsets.int()


def layout_of(tokens: str) -> TokenLayout:
    """A video of `"8192"` tokens, or of `"8x30x52"` frames, rows and columns.

    For a plain number the grid is the one nearest to square frames of four times as many rows as there
    are frames.

    Raises:
        ValueError: If it is neither, or too long.
    """
    try:
        sizes = [int(part) for part in tokens.split("x")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 3) or any(size < 1 for size in sizes):
        raise ValueError(f"tokens must be a number or FRAMESxROWSxCOLUMNS, got {tokens!r}")
    if len(sizes) == 3:
        return TokenLayout.video(*sizes)
    n = sizes[0]
    grids = [(f, h, n // f // h) for f in _divisors(n) for h in _divisors(n // f)]
    return TokenLayout.video(
        *min(grids, key=lambda g: abs(math.log(g[2] / g[1])) + abs(math.log(g[1] / g[0] / 4)))
    )


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
