"""What a block-sparse kernel takes, from what its dense mode takes: tiles of queries on the slots of a GPU.

A tile of queries costs a constant and so much for each step over a block of keys; the tiles, in their order,
each take the slot that is free first. The three constants are fitted to dense calls of several sizes.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TileModel:
    """Constants of one kernel on one device, at one head_dim and dtype.

    Args:
        launch: Seconds of a call beside its tiles.
        tile, step: Seconds of a tile, and of each of its steps.
        slots: Tiles that run at a time: multiprocessors, mostly.
        block_q, block_k: Rows of a tile, keys of a step.
    """

    launch: float
    tile: float
    step: float
    slots: int
    block_q: int
    block_k: int

    def seconds(self, steps: Sequence[float]) -> float:
        """Of a call whose tiles make so many steps, in launch order."""
        free = [0.0] * min(self.slots, len(steps))
        for count in steps:
            heapq.heapreplace(free, free[0] + self.tile + count * self.step)
        return self.launch + max(free, default=0.0)

    def uniform(self, tokens: int, heads: int, density: float = 1.0) -> float:
        """Of a call in which all tiles see the same share of the keys."""
        tiles = math.ceil(tokens / self.block_q) * heads
        waves = math.ceil(tiles / self.slots)
        return self.launch + waves * (self.tile + density * tokens / self.block_k * self.step)


def fit(
    dense: Sequence[tuple[int, int, float]], slots: int, block_q: int, block_k: int
) -> TileModel:
    """The model whose constants, none below 0, come nearest dense calls in relative error.

    Args:
        dense: Tokens, heads and seconds of each call; with few sizes some constants are 0.
        slots, block_q, block_k: Of the kernel.

    Raises:
        ValueError: If there are no calls.
    """
    if not dense:
        raise ValueError("a tile model needs dense calls to be fitted to, got none")
    waves = [math.ceil(math.ceil(n / block_q) * heads / slots) for n, heads, _ in dense]
    seconds = np.array([s for *_, s in dense])
    terms = np.array(
        [[1.0, w, w * n / block_k] for w, (n, *_) in zip(waves, dense, strict=True)]
    )  # launch, tile, step
    weighed = terms / seconds[:, None]
    best, least = np.zeros(3), math.inf
    for used in itertools.product((False, True), (False, True), (True,)):
        columns = np.flatnonzero(used)
        if len(columns) > len(dense):
            continue
        found = np.linalg.lstsq(weighed[:, columns], np.ones(len(seconds)), rcond=None)[0]
        off = float(np.square(weighed[:, columns] @ found - 1).sum())
        if (found >= 0).all() and off < least:
            best, least = np.zeros(3), off
            best[columns] = found
    return TileModel(*(float(x) for x in best), slots, block_q, block_k)
