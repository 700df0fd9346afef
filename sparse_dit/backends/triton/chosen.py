"""An index whose blocks were chosen on the device: the host never learns which."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...index import PatternIndex
from ...on_cpu import on_cpu


@dataclass(frozen=True, eq=False)
class Places:
    """Where blocks of queries and keys lie, on the CPU. Letters: N tokens, C blocks, G groups.

    Args:
        tokens: int64 `[N]`, the token at each sorted position.
        bounds: int64 `[C + 1]`: sorted positions where blocks start, and where the last ends; tokens outside
            see all and are seen by all.
        q_offsets: int64 `[G + 1]`: sorted positions where groups of query rows start.
        owner: int64 `[G]`: the block of each, -1 for rows outside.
        pools: int64: as `bounds`, of pooled keys; None without a far field.
    """

    tokens: Tensor
    bounds: Tensor
    q_offsets: Tensor
    owner: Tensor
    pools: Tensor | None


@dataclass(frozen=True, eq=False)
class ChosenBlocks:
    """The blocks that a head sees, a bit for each pair of blocks.

    Args:
        places: Where they lie.
        bits: uint8 `[C, ceil(C / 8)]` on the device, the first of 8 in the lowest bit.
    """

    places: Places
    bits: Tensor


@dataclass(frozen=True, eq=False)
class ChosenIndex:
    """One layer's attention over as many queries as keys, for the Triton backend alone.

    Args:
        heads: What each sees: blocks that were chosen on the device, or an entry on the CPU.
        device: The device that the blocks are on.

    Attributes:
        cache: What launches made of it.
    """

    heads: tuple[ChosenBlocks | PatternIndex, ...]
    device: torch.device
    cache: dict[object, Any] = field(default_factory=dict, init=False, repr=False)
    rows: None = field(default=None, init=False)

    @property
    def frame(self) -> tuple[Places | PatternIndex, ...]:
        """What the host knows of each head: where its blocks lie, or what it sees."""
        return tuple(h.places if isinstance(h, ChosenBlocks) else h for h in self.heads)

    @property
    def num_tokens(self) -> int:
        """N."""
        first = self.heads[0]
        return first.num_queries if isinstance(first, PatternIndex) else len(first.places.tokens)

    @property
    def max_groups(self) -> int:
        """The largest number of groups of query rows."""
        return max(
            h.num_groups if isinstance(h, PatternIndex) else len(h.places.owner) for h in self.heads
        )

    @property
    def is_dense(self) -> bool:
        """Whether the host knows that every head is dense."""
        return all(isinstance(h, PatternIndex) and h.is_dense for h in self.heads)

    @property
    def density(self) -> Tensor:
        """Mean density of the heads, of an index that was launched: float64 `[]` on the device."""
        return self.cache["density"]

    @property
    def num_bytes(self) -> int:
        """Memory on the device of what launches made of it, which lasts as long as the index."""
        return sum(work.num_bytes for name, work in self.cache.items() if name != "density")

    def without(self, heads: Sequence[int]) -> ChosenIndex:
        """The index with nothing to compute for some heads."""
        none = _nothing(self.num_tokens)
        left = tuple(none if h in heads else what for h, what in enumerate(self.heads))
        return replace(self, heads=left)


@functools.lru_cache(maxsize=64)
@on_cpu
def _nothing(tokens: int) -> PatternIndex:
    """The entry of a head that isn't computed."""
    bounds = torch.tensor([*range(0, tokens, 64), tokens], dtype=torch.int32)
    runs = torch.zeros(0, 2, dtype=torch.int32)
    return PatternIndex(tokens, tokens, None, None, bounds, torch.zeros_like(bounds), runs)
