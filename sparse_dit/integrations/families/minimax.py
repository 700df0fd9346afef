"""MiniMax-H3: text, conditions, sound and video packed into one sequence; the video alone is a grid.

Keyframes, references and sound count as text does: all see them, and they see all.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ...layout import Segment, TokenLayout
from ..arrangement import version_of
from .family import Arguments, Family
from .way import Way


def _minimax_h3(config: Any, arguments: Arguments) -> TokenLayout | None:
    positions, video = arguments["position_ids"], arguments["video_indices"]
    return _packed(positions, video, (version_of(positions), version_of(video)))


@functools.lru_cache(maxsize=4)
def _packed(positions: Tensor, video: Tensor, _versions: tuple[int, int]) -> TokenLayout | None:
    """The layout of a packed sequence, which all items of a batch share; None if it has no video.

    The last video is the grid: the others are conditions. Cached by identity and version of the tensors,
    which are those of all steps: they are read back from the device once.

    Args:
        positions: `[N, 3]`: time, row and column of each token, as the rotary embedding has them.
        video: `[V]`: places of the tokens of videos and images.
    """
    where = video.cpu()
    if not len(where):
        return None
    first = _last(where.diff().ne(1))
    begin, end = int(where[first]), int(where[-1]) + 1
    grid = _grid(positions[begin:end].cpu())
    if grid is None:
        return None
    before, after = end - grid.length, len(positions) - end
    parts = (
        Segment.global_(before) if before else None,
        grid,
        Segment.global_(after) if after else None,
    )
    return TokenLayout(tuple(part for part in parts if part))


def _grid(places: Tensor) -> Segment | None:
    """The grid in raster order that ends a stretch of tokens `[V, 3]`; None if its last frame is none.

    Conditions may lie right before it: a frame of another size, or one whose time isn't the one before.
    """
    time, row, column = places.unbind(1)
    falls = row.diff().lt(0) | (row.diff().eq(0) & column.diff().le(0))
    size = len(places) - _last(time.diff().ne(0) | falls)
    width = len(places) - _last(row.diff().ne(0) | falls)
    if size % width or size == 1:
        return None
    whole = len(places) // size
    frames = places[len(places) - whole * size :].view(whole, size // width, width, 3)
    last = frames[-1]
    if not (last[..., 1].eq(last[:, :1, 1]).all() and last[..., 2].eq(last[:1, :, 2]).all()):
        return None
    other = frames[:-1, ..., 1:].ne(last[..., 1:]).flatten(1).any(1)
    other |= frames[:-1, ..., 0].ne(frames[:-1, :1, :1, 0]).flatten(1).any(1)
    other |= frames[:-1, 0, 0, 0].ge(frames[1:, 0, 0, 0])
    return Segment.grid(whole - _last(other), size // width, width)


def _last(changes: Tensor) -> int:
    """How many places lie up to the last of the changes between neighbours; 0 if there is none."""
    found = changes.nonzero()
    return int(found[-1]) + 1 if len(found) else 0


FAMILIES = {
    "MiniMaxH3Transformer3DModel": Family(
        r"transformer_blocks\.\d+\.attn",
        _minimax_h3,
        max_timestep=0.0,  # the video's noise level; sound, on a flatter schedule, is ahead of it
        clean_timestep=1.0,
        way=Way(),
    ),
}
