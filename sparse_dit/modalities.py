"""Where images and videos lie among the tokens of a language model's sequence."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

Modality = Literal["text", "image", "video"]
MODALITIES: tuple[Modality, ...] = ("text", "image", "video")


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of one modality: a grid in raster order (frame, row, column).

    Args:
        kind: `"text"`, `"image"` or `"video"`.
        start, stop: Its tokens in the sequence; fewer than the grid's where the sequence is cut inside it.
        grid: Frames, rows and columns in tokens; text is 1 x 1 x its length.
        row_tokens: Tokens behind each row that belong to no column: a line break, 0 or 1. The last row's may
            lie outside.
        clip: A number that the frames of one video share, which may be parts of their own with text between;
            -1 for text.
    """

    kind: Modality
    start: int
    stop: int
    grid: tuple[int, int, int]
    row_tokens: int = 0
    clip: int = -1

    @property
    def row_period(self) -> int:
        """Tokens from one place of the grid to that a row below."""
        return self.grid[2] + self.row_tokens

    @property
    def frame_period(self) -> int:
        """Tokens from one place of the grid to the same one of the next frame, if no text is between."""
        return self.grid[1] * self.row_period


@dataclass(frozen=True)
class Modalities:
    """The images and videos of one sequence; all that lies between is text.

    Args:
        length: Number of tokens.
        media: Images and videos, in order.
        unknown: Why what may be there isn't known and everything is taken for text; None if it is known.

    Attributes:
        cache: What was made of them.
    """

    length: int
    media: tuple[Part, ...] = ()
    unknown: str | None = None
    cache: dict[object, Any] = field(
        default_factory=dict, init=False, repr=False, compare=False, hash=False
    )

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        """Every token's part, in order, text among them."""
        found, at = [], 0
        for part in self.media:
            if part.start > at:
                found.append(_text(at, part.start))
            found.append(part)
            at = part.stop
        return (*found, _text(at, self.length)) if at < self.length else tuple(found)

    def kinds(self) -> Tensor:
        """int64 `[length]`: each token's place in `MODALITIES`."""
        if "kinds" not in self.cache:
            found = torch.zeros(self.length, dtype=torch.int64, device="cpu")
            for part in self.media:
                found[part.start : part.stop] = MODALITIES.index(part.kind)
            self.cache["kinds"] = found
        return self.cache["kinds"]

    def until(self, length: int) -> Modalities:
        """Those of the first `length` tokens; of more than there are, the further ones are text."""
        if length == self.length:
            return self
        cut = (replace(p, stop=min(p.stop, length)) for p in self.media if p.start < length)
        return Modalities(length, tuple(cut), self.unknown)


def _text(start: int, stop: int) -> Part:
    return Part("text", start, stop, (1, 1, stop - start))
