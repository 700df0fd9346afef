"""The rows and columns behind a VLM's placeholders, family by family.

A family's vision tower is told the grids (Qwen-VL, GLM-V, Gemma 4, Mistral 3), or they follow from the config
and the number of placeholders (the others, whose images have one size). Letters in shapes: B batch, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...modalities import MODALITIES, Modality, Part

SHRUNK = 0.9  # share of the most tiles above which LLaVA-OneVision may have shrunk an image
GAP = 32  # tokens of text between two frames of one video, at most: a time, and marks

Grid = tuple[int, int, int]  # frames, rows, columns in tokens
Run = tuple[int, int, int]  # kind, a place in MODALITIES, start and stop of placeholders in a row
Cut = tuple[Grid, int]  # a grid, and the tokens behind each of its rows


class Unfit(Exception):
    """Why placeholders and grids don't fit together."""


@dataclass(frozen=True)
class Sight:
    """A run of placeholders.

    Args:
        kind: `"image"` or `"video"`.
        count: How many.
        whole: Whether the prompt is known beyond it.
        tiles: How many images the tower was given for it, where it is the only image.
    """

    kind: Modality
    count: int
    whole: bool
    tiles: int | None


@dataclass(frozen=True)
class Family:
    """How a family's grids are found, one way or the other.

    Args:
        told: Grids that a call of the vision tower names in its keyword arguments.
        cut: What a run of placeholders holds, in order; raises `Unfit`. What is left over behind is text.
            `told` may then count the tower's images in place of frames.
    """

    told: Callable[[Any, dict[str, Any]], list[Grid]] | None = None
    cut: Callable[[Any, Sight], list[Cut]] | None = None


def media_of(config: Any, kinds: Tensor, grids: Sequence[Grid]) -> list[tuple[Part, ...]]:
    """The images and videos of each item.

    Args:
        config: The model's config.
        kinds: uint8 `[B, L]` on the CPU: 0 text, 1 image, 2 video.
        grids: What the tower was told, in the order of its calls: images of all items first, then videos.

    Raises:
        Unfit: If they don't fit.
    """
    items = [_runs(row) for row in kinds]
    if not any(items):
        return [()] * len(items)
    family, length = FAMILIES[config.model_type], kinds.shape[1]
    if family.cut is not None:
        images = [run for runs in {tuple(runs) for runs in items} for run in runs if run[0] == 1]
        tiles = grids[0][0] if grids and len(images) == 1 else None
        found = [_cut(config, family.cut, runs, length, tiles) for runs in items]
    else:
        found = _placed(items, grids, length)
    return [_joined(parts) for parts in found]


def _runs(row: Tensor) -> list[Run]:
    """Runs of equal numbers but 0."""
    values, counts = row.unique_consecutive(return_counts=True)
    stops = counts.cumsum(0).tolist()
    starts = [0, *stops[:-1]]
    return [run for run in zip(values.tolist(), starts, stops, strict=True) if run[0]]


def _cut(config: Any, rule: Any, runs: list[Run], length: int, tiles: int | None) -> list[Part]:
    parts, clip = [], 0
    for kind, start, stop in runs:
        at = start
        sight = Sight(MODALITIES[kind], stop - start, stop < length, tiles)
        for grid, behind in rule(config, sight):
            end = min(at + grid[0] * grid[1] * (grid[2] + behind), stop)
            if end > at:
                parts.append(Part(MODALITIES[kind], at, end, grid, behind, clip))
            at, clip = end, clip + 1
    return parts


def _placed(items: list[list[Run]], grids: Sequence[Grid], length: int) -> list[list[Part]]:
    """Each item's parts from its runs and the grids of all."""
    why = ""
    for share in range(
        1, len(items) + 1
    ):  # beams and several answers share the grids of their prompt
        prompts = items[::share]
        if [runs for runs in prompts for _ in range(share)] != items:
            continue
        told = _Told(list(grids), length)
        try:
            found = [[told.take(runs, kind) for runs in prompts] for kind in (1, 2)]
        except Unfit as unfit:
            why = why or str(unfit)
            continue
        if not told.left or len(items) == 1:
            pairs = zip(*found, strict=True)
            parts = [sorted(images + videos, key=_start) for images, videos in pairs]
            return [part for part in parts for _ in range(share)]
        why = "not all images of these prompts were read yet"
    raise Unfit(why)


def _start(part: Part) -> int:
    return part.start


class _Told:
    """Grids that are still to be placed, and numbers for clips."""

    def __init__(self, grids: list[Grid], length: int) -> None:
        self.left = grids[::-1]
        self.length = length
        self.clip = 0

    def take(self, runs: list[Run], kind: int) -> list[Part]:
        """Parts of an item's runs of a kind."""
        spans = [(start, stop) for k, start, stop in runs if k == kind][::-1]
        parts: list[Part] = []
        while spans:
            if not self.left:
                raise Unfit("the vision tower was told of fewer images than the prompt has")
            parts += self._one(MODALITIES[kind], spans, self.left.pop())
            self.clip += 1
        return parts

    def _one(self, kind: Modality, spans: list[tuple[int, int]], grid: Grid) -> list[Part]:
        """The parts of one grid, off the end of `spans`."""
        frames, height, width = grid
        frame, (start, stop) = height * width, spans.pop()
        if stop - start >= frames * frame:  # in a row, and perhaps another behind it
            end = start + frames * frame
            if stop > end:
                spans.append((end, stop))
            return [Part(kind, start, end, grid, 0, self.clip)]
        if stop == self.length and stop - start != frame:  # the prompt goes on
            return [Part(kind, start, stop, grid, 0, self.clip)]
        if stop - start == frame:
            return self._frames(kind, spans, grid, (start, stop))
        return [self._rows(kind, spans, grid, (start, stop))]

    def _frames(self, kind: Modality, spans: list[Any], grid: Grid, first: Any) -> list[Part]:
        """Frames with text between."""
        _, height, width = grid
        found = [first]
        while spans and len(found) < grid[0]:
            found.append(spans.pop())
        if any(b - a != height * width and b != self.length for a, b in found):
            raise Unfit(f"the placeholders aren't {grid[0]} frames of {height} x {width}")
        one = (1, height, width)
        return [Part(kind, a, b, one, 0, self.clip) for a, b in found]

    def _rows(self, kind: Modality, spans: list[Any], grid: Grid, first: Any) -> Part:
        """Rows with a line break behind each."""
        frames, height, width = grid
        found = [first]
        while spans and len(found) < height and spans[-1][0] == found[-1][1] + 1:
            found.append(spans.pop())
        whole = len(found) == height or found[-1][1] >= self.length - 1
        last = found[-1][1] == self.length
        if (
            frames != 1
            or not whole
            or any(b - a != width for a, b in found[: -1 if last else None])
        ):
            raise Unfit(f"the placeholders aren't an image of {height} x {width}")
        return Part(kind, first[0], found[-1][1], grid, 1, self.clip)


def _joined(parts: list[Part]) -> tuple[Part, ...]:
    """The same with one clip for what follows one another as frames of one size, with little text between."""
    found: list[Part] = []
    for part in parts:
        if found and _follows(found[-1], part):
            part = replace(part, clip=found[-1].clip)
        found.append(part)
    return tuple(found)


def _follows(one: Part, two: Part) -> bool:
    alike = one.kind == two.kind and one.grid == two.grid and one.row_tokens == two.row_tokens
    return alike and one.grid[0] == 1 and two.start - one.stop <= GAP


def _grid_thw(config: Any, given: dict[str, Any]) -> list[Grid]:
    """Qwen-VL and GLM-V: patches of each image or video, of which a square becomes a token."""
    merge = config.vision_config.spatial_merge_size
    return [(t, h // merge, w // merge) for t, h, w in given["grid_thw"].tolist()]


def _image_sizes(config: Any, given: dict[str, Any]) -> list[Grid]:
    """Pixtral: pixels of each image."""
    token = config.vision_config.patch_size * config.spatial_merge_size
    sizes = given["image_sizes"]
    sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    return [(1, int(h) // token, int(w) // token) for h, w in sizes]


def _positions(config: Any, given: dict[str, Any]) -> list[Grid]:
    """Gemma 4: column and row of each patch, -1 for none."""
    pool = config.vision_config.pooling_kernel_size
    most = (given["pixel_position_ids"].amax(1) + 1).tolist()
    return [(1, rows // pool, columns // pool) for columns, rows in most]


def _sides(config: Any) -> int:
    """Patches along a side of the vision tower's image."""
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    size, patch = (x[0] if isinstance(x, Sequence) else x for x in (size, patch))
    return size // patch


def _squares(side: int, count: int) -> list[Cut]:
    """Squares one behind the other, the last perhaps cut by the end of a chunk."""
    return [((-(-count // (side * side)), side, side), 0)]


def _fixed(config: Any, run: Sight) -> list[Cut]:
    """Gemma 3, InternVL: so many tokens an image or tile, a square."""
    tokens = getattr(config, "mm_tokens_per_image", None) or config.image_seq_length
    return _squares(math.isqrt(tokens), run.count)


def _patches(config: Any, run: Sight) -> list[Cut]:
    """PaliGemma: a token a patch. SmolVLM: one for a square of them."""
    return _squares(_sides(config) // getattr(config, "scale_factor", 1), run.count)


def _next(config: Any, run: Sight) -> list[Cut]:
    """LLaVA-NeXT-Video: pooled frames; images as `_anyres` has them."""
    side = _sides(config)
    if run.kind == "video":
        return _squares(side // config.spatial_pool_stride, run.count)
    return _anyres(config, side, run)


def _onevision(config: Any, run: Sight) -> list[Cut]:
    """LLaVA-OneVision: the same with a line break behind each video."""
    side = _sides(config)
    if run.kind == "video":
        half = -(-side // 2)
        return [((max(1, run.count // (half * half)), half, half), 0)]
    return _anyres(config, side, run)


def _anyres(config: Any, side: int, run: Sight) -> list[Cut]:
    """The small image, then its tiles without their padding, with a line break behind each row.

    The number of placeholders doesn't say the size, but with that of tiles hardly ever do two sizes have it.
    """
    base, pixels, count = side * side, config.vision_config.image_size, run.count
    if count <= base + 1:
        return [((1, side, side), 0)]
    rest, found = count - base, set()
    most = str(getattr(config, "vision_aspect_ratio", "")).removeprefix("anyres_max_")
    if not run.whole or (most.isdigit() and rest > SHRUNK * int(most) * base):
        raise Unfit(f"the rows of an image of {count} tokens aren't known")
    for high, wide in ((h // pixels, w // pixels) for h, w in config.image_grid_pinpoints):
        if run.tiles not in (None, high * wide + 1):
            continue
        rows, columns = high * side, wide * side
        for h, w in ((rest // (columns + 1), columns), (rows, rest // rows - 1)):
            padding = rows - h, columns - w
            if h * (w + 1) == rest and all(p >= 0 and p % 2 == 0 for p in padding):
                found.add((h, w))
    if len(found) != 1:
        raise Unfit(f"an image of {count} tokens may be of {len(found)} sizes")
    ((h, w),) = found
    return [((1, side, side), 0), ((1, h, w), 1)]


def _tiles(config: Any, given: dict[str, Any]) -> list[Grid]:
    """LLaVA: how many images the tower is given, of which one may be many tiles."""
    return [(len(given["pixel_values"]), 0, 0)]


FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(told=_grid_thw),
    "qwen2_5_vl": Family(told=_grid_thw),
    "qwen3_vl": Family(told=_grid_thw),
    "glm4v": Family(told=_grid_thw),
    "gemma4": Family(told=_positions),
    "mistral3": Family(told=_image_sizes),
    "gemma3": Family(cut=_fixed),
    "internvl": Family(cut=_fixed),
    "smolvlm": Family(cut=_patches),
    "paligemma": Family(cut=_patches),
    "llava_next_video": Family(told=_tiles, cut=_next),
    "llava_onevision": Family(told=_tiles, cut=_onevision),
}
