"""What a head of a causal language model may be estimated as, and how many keys it may cost.

Ideas: MInference (https://arxiv.org/abs/2407.02490) for the shapes, FlexPrefill (2502.20766) for the share,
MoA (2406.14909) for budgets that grow with the length, MMInference (2504.16083) for the grid.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from .dense import Dense
from .fields import CONFIG, MAX_EXTENT, Count, Distance, Flag

Keys = Annotated[float, Field(strict=True, ge=-MAX_EXTENT, le=MAX_EXTENT)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Sampled = Annotated[int, Field(strict=True, ge=1, le=1 << 14)]


@dataclass(frozen=True, config=CONFIG)
class Budget:
    """About how many keys a row computes: `alpha + beta * length`, from `least` to `most`.

    A row that sees fewer keys computes them all. So of a causal prefill `beta` alone is a density of
    `2 * beta - beta ** 2`. With fewer than about 256 keys a row, facts in the middle of a text are lost.

    Args:
        alpha, beta: Keys, and keys for each key of the call.
        least, most: Bounds of the result; `most` is None for no bound.
    """

    alpha: Keys = 0.0
    beta: Fraction = 0.125
    least: Count = 256
    most: Count | None = None

    def __post_init__(self) -> None:
        if self.most is not None and self.most < self.least:
            raise ValueError(f"most must be at least least, got {self.most} and {self.least}")

    def density(self, length: int) -> float:
        """Computed pairs over those of causal order in a prefill of `length` tokens, about."""
        return _density(self.keys(length), length)

    def keys(self, length: int) -> int:
        """Keys a row in a call of `length` keys."""
        wanted = max(self.least, int(self.alpha + self.beta * length))
        return wanted if self.most is None else min(wanted, self.most)


@dataclass(frozen=True, config=CONFIG)
class Share:
    """The fewest keys with a share of the probability, as each prompt needs them; FlexPrefill's rule.

    Args:
        gamma: The share, of columns and of diagonals apart.
        least: A row computes at least about so many keys.
    """

    gamma: Fraction = 0.9
    least: Count = 256

    def density(self, length: int) -> float:
        """The least computed pairs over those of causal order; the prompt decides."""
        return _density(self.least, length)

    def keys(self, length: int) -> int:
        """The least number of keys a row, at any length."""
        return self.least


def _density(keys: int, length: int) -> float:
    share = min(1.0, keys / max(1, length))
    return share * (2 - share)


@dataclass(frozen=True, config=CONFIG)
class VerticalSlash:
    """The columns and the diagonals, 64 offsets each, that hold the most of some sampled rows' probability.

    Args:
        rows: Which rows are sampled: the last ones, rows spread over the sequence, or both.
        sampled: How many, of each kind. Each costs a row of a dense pass.
        budget: How much is chosen.
        sinks: So many first keys are always chosen; others are where their probability earns it.
        local: So are the keys at most about so far back.
    """

    rows: Literal["last", "spread", "both"] = "both"
    sampled: Sampled = 48
    budget: Budget | Share = Budget()
    sinks: Distance = 16
    local: Count = 64


@dataclass(frozen=True, config=CONFIG)
class PooledBlocks:
    """For every 64 rows the blocks of 64 keys whose mean key suits the rows' mean query the most.

    Args:
        budget: How much is chosen: blocks for so many keys, or those with a share of the estimate.
        sinks, local: As for `VerticalSlash`, in whole blocks.
    """

    budget: Budget | Share = Budget()
    sinks: Distance = 16
    local: Count = 64


@dataclass(frozen=True, config=CONFIG)
class SinkWindow:
    """The first keys and those just before a row: the A-shape, of StreamingLLM. Nothing is estimated.

    Args:
        sinks: How many first keys.
        budget: How many keys a row, the sinks among them.
    """

    sinks: Distance = 64
    budget: Budget = Budget()


@dataclass(frozen=True, config=CONFIG)
class Grid:
    """Lines over the grids of a VLM's images and videos: MMInference's grid heads.

    A line is all tokens at one place in a row, or at one place in a frame, of all of a clip's rows or frames.
    Which of both strides, or none, and which places, is found from sampled rows. What lines leave of the
    budget goes to single keys and diagonals. Where no image or video is known, it is a `VerticalSlash`.

    Args:
        vertical: Whether keys on lines are seen by all rows.
        slash: Whether a row sees, in all frames, what lies about its own place, or so far from it: diagonals
            that repeat with the frames.
        horizontal: Whether rows on the best line see everything.
        rows, sampled, budget, sinks, local: As for `VerticalSlash`; rows that see everything are paid first.
    """

    vertical: Flag = True
    slash: Flag = True
    horizontal: Flag = False
    rows: Literal["last", "spread", "both"] = "both"
    sampled: Sampled = 48
    budget: Budget = Budget()
    sinks: Distance = 16
    local: Count = 64

    def __post_init__(self) -> None:
        if not (self.vertical or self.slash or self.horizontal):
            raise ValueError("a grid needs vertical, slash or horizontal lines, got none of them")


@dataclass(frozen=True, config=CONFIG)
class OwnPart:
    """A row sees the image, frame or stretch of text that it is in, and the first keys. Nothing is estimated.

    A video whose frames have no text between is one part. Where a mask lets an image's rows see their whole
    image, as Gemma 3's does, they do.

    Args:
        sinks: How many first keys.
    """

    sinks: Distance = 64


Plain = VerticalSlash | PooledBlocks | SinkWindow | Grid | OwnPart | Dense


@dataclass(frozen=True, config=CONFIG)
class ByKey:
    """What a row sees of keys of text, of images and of videos: a shape each, as MMInference's 2-D boundary.

    Each is estimated from the same rows, over all keys, and chooses among keys of its own; a budget's length
    is their number.

    Args:
        text, image, video: The shapes.
    """

    text: Plain = Dense()
    image: Plain = Dense()
    video: Plain = Dense()


@dataclass(frozen=True, config=CONFIG)
class ByQuery:
    """What rows of text, of images and of videos see: a shape each, as MMInference's Q-boundary.

    Each is estimated from rows of its own. With a `ByKey` in it, it is the 2-D boundary. Where no image or
    video is known, all rows are text.

    Args:
        text, image, video: The shapes.
    """

    text: Plain | ByKey = Dense()
    image: Plain | ByKey = Dense()
    video: Plain | ByKey = Dense()


Shape = Plain | ByKey | ByQuery


def density(shape: Shape, length: int) -> float:
    """Computed pairs over those of causal order in a prefill of `length` tokens of text, about."""
    if isinstance(shape, ByQuery | ByKey):
        return density(shape.text, length)
    return 1.0 if isinstance(shape, OwnPart | Dense) else shape.budget.density(length)
