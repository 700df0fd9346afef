"""Windows of Sliding Tile Attention, and which of them holds what a head's pattern says.

A window is a number of tiles on each axis around a query's own tile, shifted inwards at the borders
(https://arxiv.org/abs/2502.04507). The rule is that of FastVideo's kernel and of those that follow it: an
even number reaches as far on either side as the odd one above it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from ...curve import Curve
from ...patterns import Dense, Pattern, SlidingTile, Window
from ...patterns.fields import extent

TILE = (6, 8, 8)  # frames, rows and columns of a tile, the only one that kernels of STA have
GridSize = tuple[int, int, int]
Bounds = tuple[tuple[int, int], ...]  # on one axis, the first and last token that each token sees


class Fitted(NamedTuple):
    """The window that a pattern becomes.

    Attributes:
        window: Tiles on each axis; that of the whole grid where the head is dense.
        exact: Whether it computes the pattern's pairs and no others.
        dense_because: Why a sparse pattern becomes a whole grid; None if it doesn't.
    """

    window: GridSize
    exact: bool
    dense_because: str | None = None


def tiles_of(grid: GridSize) -> GridSize:
    """Number of tiles on each axis of a grid of tokens; the last ones may be smaller."""
    frames, rows, columns = (-(-n // size) for n, size in zip(grid, TILE, strict=True))
    return frames, rows, columns


def reach(window: int, tiles: int) -> int:
    """The odd number of tiles that a window has on an axis, or all of the axis' `tiles`."""
    return min(2 * (window // 2) + 1, tiles)


def pattern_of(window: GridSize, grid: GridSize) -> Pattern:
    """What a head with this window computes, at every size; a window as large as the grid is dense."""
    counts = [reach(w, n) for w, n in zip(window, tiles_of(grid), strict=True)]
    sizes = [None if c == n else c for c, n in zip(counts, tiles_of(grid), strict=True)]
    if sizes == [None] * 3:
        return Pattern(Dense())
    return Pattern(SlidingTile(*sizes), tile=TILE)


@functools.lru_cache(maxsize=4096)
def fitted(pattern: Pattern, grid: GridSize) -> Fitted:
    """The smallest window that computes all that a pattern does on a grid of tokens."""
    whole = tiles_of(grid)
    if pattern.is_dense:
        return Fitted(whole, True)
    if reason := _beyond(pattern):
        return Fitted(whole, False, reason)
    window, exact = [], pattern.cell is None
    for axis in range(3):
        needed = _needed(pattern, axis, grid[axis])
        count = next(
            k
            for k in (*range(1, whole[axis], 2), whole[axis])
            if _holds(_bounds(k, TILE[axis], grid[axis]), needed)
        )
        exact = exact and _bounds(count, TILE[axis], grid[axis]) == needed
        window.append(count)
    frames, rows, columns = window
    if (frames, rows, columns) == whole and not exact:
        return Fitted(whole, False, "window so wide that tiles of 6x8x8 fill the grid")
    return Fitted((frames, rows, columns), exact)


def density(window: GridSize, grid: GridSize, others: int = 0) -> float:
    """Computed pairs / all pairs, where `others` further tokens see all and are seen by all."""
    pairs, tokens = 1, 1
    for count, size, length in zip(window, TILE, grid, strict=True):
        pairs *= sum(last - first + 1 for first, last in _bounds(count, size, length))
        tokens *= length
    total = tokens + others
    return (pairs + total * total - tokens * tokens) / (total * total)


def _beyond(pattern: Pattern) -> str | None:
    """What a pattern says that no window can."""
    if not isinstance(pattern.shape, SlidingTile | Window):
        return f"shape {pattern.name!r}"
    if isinstance(pattern.tile, Curve):
        return "order along a curve"
    if pattern.far:
        return "far field"
    if pattern.every > 1:
        return "outputs of steps before"
    return "frames that all see" if pattern.sink_frames else None


def _needed(pattern: Pattern, axis: int, length: int) -> Bounds:
    """What each token of an axis sees by a pattern, with whole tiles of its own as keys."""
    assert not isinstance(pattern.tile, Curve), "asked for before"
    size = min(pattern.tile[axis] or length, length)
    name = ("frames", "rows", "columns")[axis]
    value, shape = getattr(pattern.shape, name), pattern.shape
    if isinstance(shape, SlidingTile):
        tiles = -(-length // size)
        return _shifted(tiles if value is None else min(value, tiles), size, length)
    distance, bounds = extent(value, length), []
    for token in range(length):
        first = token // size * size
        last = min(first + size, length) - 1
        low = max(0, first - distance) // size * size
        high = min(length - 1, last + distance) // size * size + size - 1
        bounds.append((low, min(high, length - 1)))
    return tuple(bounds)


@functools.lru_cache(maxsize=1024)
def _bounds(count: int, size: int, length: int) -> Bounds:
    """What each token of an axis sees by a window of `count` tiles of `size` tokens."""
    tiles = -(-length // size)
    return _shifted(reach(count, tiles), size, length)


def _shifted(count: int, size: int, length: int) -> Bounds:
    tiles, bounds = -(-length // size), []
    for token in range(length):
        first = min(max(token // size - count // 2, 0), tiles - count)
        bounds.append((first * size, min((first + count) * size, length) - 1))
    return tuple(bounds)


def _holds(outer: Bounds, inner: Bounds) -> bool:
    return all(a <= c and d <= b for (a, b), (c, d) in zip(outer, inner, strict=True))
