"""Where grids of tokens and tokens that all see lie in the sequence of an attention layer."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .curve import Curve
from .on_cpu import on_cpu

MAX_TOKENS = 1 << 24


Kinds = tuple[str, str]
KINDS: Kinds = ("global", "grid")  # of segments, in their written form
OLD_KINDS: Kinds = ("text", "video")  # in plans of versions 1 and 2, and profiles of that time


@dataclass(frozen=True)
class Segment:
    """A stretch of consecutive tokens: a grid in raster order (frame, row, column), or global ones.

    Global tokens see all tokens and are seen by all, whatever the pattern: text beside a video, for
    instance, or attention sinks. A plain sequence of n tokens is a grid of 1 x 1 x n.

    Args:
        kind: `"global"` or `"grid"`.
        length: Number of tokens; for a grid it must be `frames * height * width`.
        frames, height, width: Size of a grid (in tokens, not pixels); 0 for global tokens.

    Raises:
        ValueError: If a size is not a positive int, or `length` contradicts the grid.
    """

    kind: Literal["global", "grid"]
    length: int
    frames: int = 0
    height: int = 0
    width: int = 0

    def __post_init__(self) -> None:
        sizes = (self.length, self.frames, self.height, self.width)
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in sizes):
            raise ValueError(f"a segment's sizes must be ints >= 0, got {sizes}")
        if not 1 <= self.length <= MAX_TOKENS:
            raise ValueError(f"a segment must hold 1 to {MAX_TOKENS} tokens, got {self.length}")
        if self.kind == "global":
            if self.frames or self.height or self.width:
                raise ValueError(f"a segment of global tokens has no grid, got {sizes[1:]}")
        elif self.kind == "grid":
            if self.frames * self.height * self.width != self.length:
                raise ValueError(f"a grid of {sizes[1:]} can't have {self.length} tokens")
        else:
            raise ValueError(f"a segment is 'global' or 'grid', got {self.kind!r}")

    @staticmethod
    def global_(length: int) -> Segment:
        """`length` tokens that see all and are seen by all."""
        return Segment("global", length)

    @staticmethod
    def grid(frames: int, height: int, width: int) -> Segment:
        """`frames x height x width` tokens in raster order."""
        return Segment("grid", frames * height * width, frames, height, width)


@dataclass(frozen=True)
class TokenLayout:
    """The segments of one sequence, in order. Hashable, so that indices can be cached by it.

    Frames are numbered on through all grids, so that a video whose frames are separated by global tokens
    (as in many VLMs) is one grid. An image is a video of one frame.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError("a layout needs at least one segment, got none")
        if self.seq_len > MAX_TOKENS:
            raise ValueError(f"a layout holds at most {MAX_TOKENS} tokens, got {self.seq_len}")

    @staticmethod
    def video(
        frames: int, height: int, width: int, *, text_before: int = 0, text_after: int = 0
    ) -> TokenLayout:
        """The grid of one video, with text as global tokens before it, after it, both or neither.

        Args:
            frames, height, width: Size of the video in tokens.
            text_before, text_after: Numbers of text tokens.
        """
        text = [Segment.global_(n) if n else None for n in (text_before, text_after)]
        parts = (text[0], Segment.grid(frames, height, width), text[1])
        return TokenLayout(tuple(part for part in parts if part))

    @staticmethod
    def sequence(length: int) -> TokenLayout:
        """A plain sequence of `length` tokens: a grid of 1 x 1 x `length`, whose columns they are."""
        return TokenLayout.video(1, 1, length)

    @property
    def seq_len(self) -> int:
        """Number of tokens in all."""
        return sum(segment.length for segment in self.segments)

    @property
    def num_global(self) -> int:
        """Number of global tokens."""
        return sum(s.length for s in self.segments if s.kind == "global")

    @property
    def num_grid(self) -> int:
        """Number of tokens in grids."""
        return self.seq_len - self.num_global

    @property
    def grid(self) -> tuple[int, int, int]:
        """`(frames, height, width)` that bounds all grids; zeros if there is none."""
        grids = [s for s in self.segments if s.kind == "grid"]
        if not grids:
            return (0, 0, 0)
        return (
            sum(s.frames for s in grids),
            max(s.height for s in grids),
            max(s.width for s in grids),
        )

    def without_global(self) -> TokenLayout:
        """The grids alone.

        Raises:
            ValueError: If there is none.
        """
        return TokenLayout(tuple(s for s in self.segments if s.kind == "grid"))

    def cut(self, seq_len: int) -> TokenLayout:
        """The first `seq_len` tokens, if no more than global ones at the end are lost; else all of them."""
        *others, last = self.segments
        length = seq_len - self.seq_len + last.length
        if last.kind != "global" or not others or not 0 <= length < last.length:
            return self
        return TokenLayout((*others, Segment.global_(length)) if length else tuple(others))

    def to_dict(self) -> dict[str, Any]:
        """`{"segments": [["global", 226], ["grid", 11, 30, 45]]}`."""
        return {
            "segments": [
                [s.kind, s.length] if s.kind == "global" else [s.kind, s.frames, s.height, s.width]
                for s in self.segments
            ]
        }

    @staticmethod
    def from_dict(data: dict[str, Any], kinds: Kinds = KINDS) -> TokenLayout:
        """Inverse of `to_dict`.

        Args:
            data: The written form.
            kinds: What global tokens and grids are called in it.

        Raises:
            ValueError: If the form or a size is wrong.
        """
        if not isinstance(data, dict) or set(data) != {"segments"}:
            raise ValueError(f"a layout must be {{'segments': [...]}}, got {str(data)[:80]}")
        if not isinstance(data["segments"], list):
            raise ValueError(f"segments must be a list, got {type(data['segments']).__name__}")
        return TokenLayout(tuple(_segment(entry, kinds) for entry in data["segments"]))

    def __str__(self) -> str:
        parts = [
            f"{s.length} global" if s.kind == "global" else f"{s.frames}x{s.height}x{s.width}"
            for s in self.segments
        ]
        return " + ".join(parts)


def _segment(entry: Any, kinds: Kinds) -> Segment:
    everywhere, grid = kinds
    sizes = {everywhere: 1, grid: 3}
    kind = entry[0] if isinstance(entry, list) and entry else None
    if not isinstance(kind, str) or kind not in sizes or len(entry) != 1 + sizes[kind]:
        raise ValueError(
            f"a segment must be [{everywhere!r}, n] or [{grid!r}, frames, height, width], "
            f"got {str(entry)[:80]}"
        )
    if any(
        isinstance(n, bool) or not isinstance(n, int) or not 0 < n <= MAX_TOKENS for n in entry[1:]
    ):
        raise ValueError(f"a segment's sizes must be ints from 1 to {MAX_TOKENS}, got {entry[1:]}")
    return Segment.global_(entry[1]) if kind == everywhere else Segment.grid(*entry[1:])


Tile = tuple[int | None, int | None, int | None] | Curve


@dataclass(frozen=True, eq=False)
class Boxes:
    """`n` axis-aligned boxes of grid tokens; both bounds belong to the box.

    Args:
        lo, hi: int64 `[n, 3]`: smallest and largest frame, row and column.
    """

    lo: Tensor
    hi: Tensor

    def __len__(self) -> int:
        return self.lo.shape[0]

    def slice(self, start: int, stop: int) -> Boxes:
        """Boxes `start` to `stop - 1`."""
        return Boxes(self.lo[start:stop], self.hi[start:stop])

    def at(self, places: Tensor) -> Boxes:
        """The boxes at some places, int64 `[m]`."""
        return Boxes(self.lo[places], self.hi[places])


@dataclass(frozen=True, eq=False)
class TileOrder:
    """A layout's tokens sorted so that each 3-D tile of its grid is contiguous.

    Global tokens before the grid stay first, then come the tiles in raster order, each in raster order
    inside, then the other global tokens. With tiles as wide as the grid the order is the raster itself,
    with tiles as long as the grid (and one row high) it is pixel-major. Along a `Curve`, all of this is
    meant of the unrolled grid.

    Args:
        order: int64 `[N]`, the token at each sorted position.
        global_before: Number of global tokens sorted before the grid.
        tile_offsets: int64 `[T + 1]`, sorted positions where tiles start, and where the last ends.
        coordinates: int64 `[num_grid, 3]`: frame, row and column of the grid tokens, sorted.
        tile: Tile size with `None` replaced by the axis' length.
        grid: The grid that shapes see: the layout's, unrolled along a curve.
    """

    order: Tensor
    global_before: int
    tile_offsets: Tensor
    coordinates: Tensor
    tile: tuple[int, int, int]
    grid: tuple[int, int, int]
    _boxes: dict[int | None, Boxes] = field(default_factory=dict, repr=False)

    @property
    @on_cpu
    def is_identity(self) -> bool:
        """Whether sorting changes nothing."""
        return bool((self.order == torch.arange(len(self.order))).all())

    def cell_offsets(self, cell: int | None) -> Tensor:
        """int64 `[C + 1]`: tiles cut into runs of at most `cell` tokens (None: not cut)."""
        return self.tile_offsets if cell is None else cut_offsets(self.tile_offsets, cell)

    def boxes(self, cell: int | None = None) -> Boxes:
        """Bounding boxes of the cells of `cell_offsets(cell)`; kept, so that they are made once."""
        if cell not in self._boxes:
            self._boxes[cell] = self._bound(self.cell_offsets(cell))
        return self._boxes[cell]

    @on_cpu
    def _bound(self, offsets: Tensor) -> Boxes:
        n = len(offsets) - 1
        owner = torch.repeat_interleave(torch.arange(n), offsets.diff())[:, None].expand(-1, 3)
        lo = torch.zeros(n, 3, dtype=torch.int64)
        hi = torch.zeros(n, 3, dtype=torch.int64)
        lo.scatter_reduce_(0, owner, self.coordinates, "amin", include_self=False)
        hi.scatter_reduce_(0, owner, self.coordinates, "amax", include_self=False)
        return Boxes(lo, hi)


@on_cpu
def cut_offsets(offsets: Tensor, size: int) -> Tensor:
    """Offsets int64 `[n + 1]` with each stretch between two cut into runs of at most `size`."""
    starts, stops = offsets[:-1], offsets[1:]
    parts = (stops - starts + size - 1) // size
    first = torch.repeat_interleave(starts, parts)
    rank = torch.arange(len(first)) - torch.repeat_interleave(parts.cumsum(0) - parts, parts)
    return torch.cat([first + rank * size, offsets[-1:]])


@functools.lru_cache(maxsize=64)
@on_cpu
def tile_order(layout: TokenLayout, tile: Tile) -> TileOrder:
    """Sort `layout`'s tokens by 3-D tiles of `tile` frames, rows and columns (None: whole axis).

    Tiles at the far border are smaller where the grid is not a multiple of the tile. Along a curve, tiles
    are stretches of it.
    """
    grid = layout.grid
    global_before, position, grids, others, coordinates, frame = 0, 0, [], [], [], 0
    for segment in layout.segments:
        span = torch.arange(position, position + segment.length)
        position += segment.length
        if segment.kind == "global":
            others.append(span)
            global_before += 0 if grids else segment.length
            continue
        axes = [torch.arange(n) for n in (segment.frames, segment.height, segment.width)]
        cell = torch.cartesian_prod(*axes)
        cell[:, 0] += frame
        frame += segment.frames
        grids.append(span)
        coordinates.append(cell)
    if not grids:
        empty = torch.zeros(1, dtype=torch.int64)
        order = torch.arange(layout.seq_len)
        return TileOrder(order, layout.seq_len, empty, torch.zeros(0, 3).long(), (1, 1, 1), grid)
    where, place = torch.cat(grids), torch.cat(coordinates)
    if isinstance(tile, Curve):
        place, grid, tile = tile.unroll(place, grid), tile.unrolled(grid), tile.tile
        along = (place[:, 0] * grid[2] + place[:, 2]).argsort()
        where, place = where[along], place[along]
    deep, high, wide = (n if t is None else min(t, n) for t, n in zip(tile, grid, strict=True))
    size = (deep, high, wide)
    index = place // torch.tensor(size)
    counts = [-(-n // t) for n, t in zip(grid, size, strict=True)]
    tile_id = (index[:, 0] * counts[1] + index[:, 1]) * counts[2] + index[:, 2]
    rank = torch.argsort(tile_id, stable=True)
    sizes = torch.bincount(tile_id)
    sizes = sizes[sizes > 0]
    rest = torch.cat(others) if others else torch.zeros(0, dtype=torch.int64)
    order = torch.cat([rest[:global_before], where[rank], rest[global_before:]])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    return TileOrder(order, global_before, offsets, place[rank], size, grid)
