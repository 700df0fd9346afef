"""Shapes over a grid whose blocks are found in a call's own queries and keys, in the pattern's token order.

A block, of queries or of keys, is a cell of the pattern: a tile, or a part of one.
Papers: MInference (https://arxiv.org/abs/2407.02490) and Sol-Attn (2607.24027) for pooled queries and keys,
XAttention (2503.16428) for antidiagonals, AdaSpa (2502.21079) for exact mass that is kept.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from .cluster import Cluster
from .estimated import Budget, Share
from .fields import CONFIG, Distance, Flag, Refresh

Parts = Annotated[int, Field(strict=True, ge=1, le=16)]
Stride = Annotated[int, Field(strict=True, ge=1, le=64)]
Sigmas = Annotated[float, Field(strict=True, ge=-64, le=64)]
Level = Annotated[float, Field(strict=True, ge=0, le=1)]


@dataclass(frozen=True, config=CONFIG)
class Above:
    """The blocks whose logit is so far above the mean of their row, as Sol-Attn routes.

    Args:
        sigmas: How far, in standard deviations of the row.
    """

    sigmas: Sigmas = 0.5


@dataclass(frozen=True, config=CONFIG)
class Pooled:
    """For every block of queries the blocks of keys whose mean key suits the mean query the most.

    Args:
        keep: How much is seen exactly: keys a row, a share of the estimated probability, or what is above
            the row's mean.
        parts: Blocks are pooled in so many equal parts, whose probabilities are added up.
        own_order: Each head has the token order that errs the least, out of cubes, flat tiles and lines
            through all frames, or sees every n-th key instead; tried on a few rows at the first step at which
            it isn't dense.
        dense_above: At noise levels above this one the head is dense.
        local: Blocks that are seen anyway, along the token order: 0 none, 1 a query's own, 2 one on either
            side too, ...
        refresh: What is found at the first step of a stage is kept for so many steps, itself among them;
            None: for the whole stage.
        isolated: `keep` is of each segment of the sequence on its own, as SparseD (2509.24014) chooses among
            the prompt and the generated tokens of a diffusion language model.
        canvas: Tokens that such a model is denoising see everything and are seen by all; beside a cache they
            see one another, and `keep` is of what is in the cache too.
    """

    keep: Budget | Share | Above = Budget(beta=0.25, least=64)
    parts: Parts = 1
    own_order: Flag = False
    dense_above: Level = 1.0
    local: Distance = 0
    refresh: Refresh = 1
    isolated: Flag = False
    canvas: Flag = False

    def __post_init__(self) -> None:
        if self.own_order and not isinstance(self.keep, Budget):
            raise ValueError("own_order needs a budget of keys, whose orders are then compared")


@dataclass(frozen=True, config=CONFIG)
class Antidiagonal:
    """The blocks with the most probability, by the logits on one antidiagonal of each square of tokens.

    Args:
        keep: As for `Pooled`.
        stride: Side of a square. The estimate costs a dense pass over the keys' logits by it.
        local, refresh: As for `Pooled`.
    """

    keep: Budget | Share = Share(0.95, 64)
    stride: Stride = 8
    local: Distance = 0
    refresh: Refresh = 1


@dataclass(frozen=True, config=CONFIG)
class Mass:
    """The blocks that held the most probability where the head was last computed in full.

    At a refresh the head is dense, and its exact probability in each block is kept.

    Args:
        keep: As for `Pooled`.
        adaptive: AdaSpa's rule: of the heads of a layer those in whose blocks most of the probability lies
            see half as many keys, and as many others half as many more.
        dense_above: At noise levels above this one the head is dense in every call, and its probability
            counted, so that a generation's first steps are exact and no other step has to be.
        local, refresh, isolated, canvas: As for `Pooled`.
    """

    keep: Budget | Share = Budget(beta=0.25, least=64)
    adaptive: Flag = False
    dense_above: Level = 1.0
    local: Distance = 0
    refresh: Refresh = None
    isolated: Flag = False
    canvas: Flag = False

    def __post_init__(self) -> None:
        if self.isolated and self.adaptive:
            raise ValueError("isolated and adaptive can't be had together; leave one of them out")


def density(shape: Pooled | Antidiagonal | Mass | Cluster, length: int) -> float:
    """The share of the keys that a row sees exactly where it isn't dense; the most of it, where calls decide.

    A share of the probability needs at most as large a share of equal blocks; and no more than
    1 / (1 + s^2) of them lie s deviations above the mean (Cantelli's inequality).

    Args:
        shape: What is found.
        length: Tokens of the grid.
    """
    keep = shape.keep
    if isinstance(keep, Above):
        return 1 / (1 + max(0.0, keep.sigmas) ** 2)
    least = keep.keys(length) / max(1, length)
    if isinstance(shape, Cluster):
        least = max(least, shape.least)
    return min(1.0, max(least, keep.gamma) if isinstance(keep, Share) else least)
