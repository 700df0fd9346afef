"""LTX and LTX 2: packed video tokens alone, text (and sound) by cross-attention."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from ...layout import Segment, TokenLayout
from ..arrangement import version_of
from .family import Arguments, Family
from .way import Axis, Way


def _ltx(config: Any, arguments: Arguments) -> TokenLayout | None:
    """Positions come as a grid, or as coordinates of each token, and then sizes say nothing."""
    coords = arguments.get("video_coords")
    return _grid(arguments) if coords is None else _from_coords(coords, version_of(coords))


def _ltx2(config: Any, arguments: Arguments) -> TokenLayout | None:
    """Keyframes and references may be appended to the grid: all see them, as if they were text."""
    video = _grid(arguments)
    if video is None:
        return None
    others = arguments["hidden_states"].shape[1] - video.seq_len
    if others < 0:
        return None
    return TokenLayout((*video.segments, Segment.global_(others))) if others else video


def _grid(arguments: Arguments) -> TokenLayout | None:
    sizes = [arguments.get(name) for name in ("num_frames", "height", "width")]
    if None in sizes:
        return None
    return TokenLayout.video(*(int(n) for n in sizes))  # pyright: ignore[reportArgumentType]


@functools.lru_cache(maxsize=2)
def _from_coords(coords: Tensor, _version: int) -> TokenLayout | None:
    """The layout of tokens at `coords` `[B, 3, N]` (time, row, column); None if they are no frames.

    The longest stretch of frames whose time rises is the video. Frames before and after it (given ones,
    out of turn) are tokens that all see. Cached by identity and version: most pipelines pass one tensor.
    """
    times, rows, columns = coords[0].cpu()
    size = _first(times.diff().ne(0) | rows.diff().lt(0), len(times))
    width = _first(rows[:size].diff().ne(0), size)
    if len(times) % size or size % width:
        return None
    times, rows, columns = (x.view(-1, size // width, width) for x in (times, rows, columns))
    time, down, across = times[:, :1, :1], rows[:1, :, :1], columns[:1, :1]
    if not (
        torch.equal(times, time.expand_as(times))
        and torch.equal(rows, down.expand_as(rows))
        and torch.equal(columns, across.expand_as(columns))
        and down.diff(dim=1).gt(0).all()
        and across.diff(dim=2).gt(0).all()
    ):
        return None
    starts = [0, *(time.flatten().diff().le(0).nonzero().flatten() + 1).tolist(), len(times)]
    begin, end = max(itertools.pairwise(starts), key=lambda run: (run[1] - run[0], run[0]))
    return TokenLayout.video(
        end - begin,
        size // width,
        width,
        text_before=begin * size,
        text_after=(len(times) - end) * size,
    )


def _first(changes: Tensor, otherwise: int) -> int:
    """How many tokens lie before the first change between neighbours."""
    return int(changes.int().argmax()) + 1 if changes.any() else otherwise


LAYERS = r"transformer_blocks\.\d+\.attn1"

FAMILIES = {
    "LTXVideoTransformer3DModel": Family(LAYERS, _ltx, way=Way({"": {"timestep": Axis(1, 2)}})),
    "LTX2VideoTransformer3DModel": Family(LAYERS, _ltx2),
}
