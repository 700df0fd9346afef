"""The blocks of a grid that estimates choose among, at one size and in one token order.

Letters in shapes: L heads, N tokens, C blocks, G groups of query rows, R key runs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..backends.cpu import estimates, library
from ..backends.triton.chosen import Places
from ..entry import FarField, PatternIndex, expand
from ..index import Groups, entry_of, groups_of
from ..layout import Tile, TileOrder, TokenLayout, cut_offsets, tile_order
from ..on_cpu import on_cpu
from ..patterns import Pattern

GROUP = 64  # query rows


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of queries and keys, which are the same stretches of sorted tokens. All tensors are on the CPU.

    Args:
        order: The order of the tokens.
        cells: int64 `[C + 1]`, as of `TileOrder.cell_offsets`.
        groups: Rows of every block, and of global tokens.
        far, pool, cell: As of a `Pattern`.
        sinks: Bool `[C]`: blocks of keys that all rows see.
    """

    order: TileOrder
    cells: Tensor
    groups: Groups
    far: bool
    pool: int | None
    sinks: Tensor
    cell: int | None = None

    @property
    def num_blocks(self) -> int:
        """C."""
        return len(self.cells) - 1

    @functools.cached_property
    def sizes(self) -> Tensor:
        """int64 `[C]`: tokens of each block."""
        return self.cells.diff()

    @functools.cached_property
    def bounds(self) -> Tensor:
        """int32 `[C + 1]`: sorted positions where blocks start, and where the last ends."""
        return (self.cells + self.order.global_before).int()

    @functools.cached_property
    def places(self) -> Places:
        """The same for the Triton backend, which lays out what is chosen on its device."""
        pools = self.pools.long() if self.far else None
        groups = self.groups
        return Places(self.order.order, self.bounds.long(), groups.offsets, groups.owner, pools)

    @functools.cached_property
    def permutation(self) -> Tensor | None:
        """int32 `[N]`: the token at each sorted position; None if tokens stay in place."""
        return None if self.order.is_identity else self.order.order.int()

    @functools.cached_property
    def pools(self) -> Tensor:
        """int32: sorted positions where pooled keys start, and where the last ends."""
        return (
            self.bounds if self.pool is None else cut_offsets(self.bounds.long(), self.pool).int()
        )

    @functools.cached_property
    def pool_of(self) -> Tensor:
        """int32 `[C + 1]`: number of the first pooled key of each block."""
        return torch.searchsorted(self.pools, self.bounds).int()

    @functools.cached_property
    def q_offsets(self) -> Tensor:
        """int32 `[G + 1]`."""
        return self.groups.offsets.int()

    @functools.cached_property
    def whole(self) -> PatternIndex:
        """Every row sees every key, in these groups of rows."""
        everything = torch.ones(self.num_blocks, self.num_blocks, dtype=torch.bool)
        return self.entries(everything[None])[0]

    @functools.cached_property
    def segments(self) -> Tensor:
        """int64 `[C]`: the frame that each block begins in: of a plain sequence, its segment."""
        return self.order.boxes(self.cell).lo[:, 0]

    def near(self, local: int, active: int = 0, alone: bool = False) -> Tensor:
        """Bool `[C, C]`: blocks less than `local` places apart in the order, sinks, and active blocks.

        Args:
            local: See a pattern's shape.
            active: So many last tokens see everything and are seen by all.
            alone: Whether they are all that is computed, beside a cache: then they are only seen by all.
        """
        place = torch.arange(self.num_blocks)
        near = ((place[:, None] - place).abs() < local) | self.sinks
        if not active:
            return near
        open_ = self.bounds[1:] > self.num_tokens - active
        return near | open_ if alone else near | open_ | open_[:, None]

    def first_of(self, rows: int) -> int:
        """The block that the last `rows` tokens begin with.

        Raises:
            ValueError: If they begin inside a block, or are sorted.
        """
        start = self.num_tokens - rows
        first = int((self.bounds < start).sum())
        if self.permutation is not None or int(self.bounds[first]) != start:
            raise ValueError(
                f"queries that are the last {rows} of {self.num_tokens} tokens need blocks that begin with "
                "the first of them; use a tile of one frame and one row"
            )
        return first

    @on_cpu
    def entries(self, chosen: Tensor, groups: Tensor | None = None) -> list[PatternIndex]:
        """An entry for each head.

        Args:
            chosen: Bool `[L, C, C]`: which blocks of keys each block of queries sees exactly.
            groups: int64 `[g]`: the groups whose rows the entries are of, see `part_of`; None for all.
        """
        if library.LIBRARY is None:
            found = [
                entry_of(one, self.order, self.cells, self.groups, self.far, self.pool)
                for one in chosen
            ]
            return found if groups is None else [part_of(entry, groups) for entry in found]
        owner, pool_of = self.groups.owner.int(), self.pool_of if self.far else None
        num_queries, q_order, q_offsets = self.num_tokens, self.permutation, self.q_offsets
        if groups is not None:
            owner, q_order = owner[groups], None
            q_offsets = bounds_of(q_offsets.diff()[groups])
            num_queries = int(q_offsets[-1])
        offsets, runs, far_offsets, far_runs = estimates.lay_blocks(
            chosen, self.bounds, owner, self.num_tokens, pool_of
        )
        found = []
        far: Sequence[FarField | None] = [None] * len(chosen)
        if far_offsets is not None:
            parts = zip(far_offsets, far_runs.split(far_offsets[:, -1].tolist()), strict=True)
            far = [FarField(self.pools, of, part) for of, part in parts]
        parts = runs.split(offsets[:, -1].tolist())
        for of, part, pooled in zip(offsets, parts, far, strict=True):
            k_order = self.permutation
            found.append(
                PatternIndex(
                    num_queries, self.num_tokens, q_order, k_order, q_offsets, of, part, pooled
                )
            )
        return found

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.order.order)


@dataclass(frozen=True, eq=False)
class Chosen:
    """The blocks that a head sees, as they are kept: a bit for each pair of blocks.

    Args:
        blocks: Where they lie.
        bits: A bool `[C, C]`, row by row, 8 to a byte.
    """

    blocks: Blocks
    bits: NDArray[np.uint8]

    @staticmethod
    def of(blocks: Blocks, chosen: Tensor) -> Chosen:
        """From bool `[C, C]`."""
        return Chosen(blocks, np.packbits(chosen.numpy()))

    @property
    def mask(self) -> Tensor:
        """Bool `[C, C]`."""
        c = self.blocks.num_blocks
        return torch.from_numpy(np.unpackbits(self.bits, count=c * c)).view(torch.bool).view(c, c)


Seen = PatternIndex | Chosen


@on_cpu
def entries_of(seen: Mapping[int, Seen]) -> dict[int, PatternIndex]:
    """The entry of each head; those of blocks are laid out, others stay as they are."""
    entries: dict[int, PatternIndex] = {}
    alike: dict[int, list[tuple[int, Chosen]]] = {}
    for head, what in seen.items():
        if isinstance(what, Chosen):
            alike.setdefault(id(what.blocks), []).append((head, what))
        else:
            entries[head] = what
    for listed in alike.values():
        masks = torch.stack([chosen.mask for _, chosen in listed])
        laid = listed[0][1].blocks.entries(masks)
        entries |= zip((head for head, _ in listed), laid, strict=True)
    return entries


def blocks_of(pattern: Pattern, layout: TokenLayout) -> Blocks:
    """The blocks of a pattern; the same object for patterns that share them."""
    return _blocks(
        layout, pattern.tile, pattern.cell, pattern.far, pattern.pool, pattern.sink_frames
    )


@functools.lru_cache(maxsize=256)
@on_cpu
def _blocks(layout: TokenLayout, tile, cell, far, pool, sink_frames) -> Blocks:
    order = tile_order(layout, tile)
    cells = order.cell_offsets(cell)
    sinks = order.boxes(cell).lo[:, 0] < sink_frames
    return Blocks(order, cells, groups_of(order, cells, GROUP), far, pool, sinks, cell)


@on_cpu
def part_of(entry: PatternIndex, groups: Tensor) -> PatternIndex:
    """The entry of the rows of some groups, int64 `[g]`, alone: as many queries, in its order."""

    def lists(offsets: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
        counts = offsets.diff()[groups]
        return bounds_of(counts), runs[expand(torch.stack([offsets[:-1][groups], counts], 1))]

    far = entry.far
    if far is not None:
        far = FarField(far.cell_offsets, *lists(far.run_offsets, far.runs))
    offsets, runs = lists(entry.run_offsets, entry.runs)
    rows = bounds_of(entry.q_offsets.diff()[groups])
    n, m = int(rows[-1]), entry.num_keys
    return PatternIndex(n, m, None, entry.k_order, rows, offsets, runs, far)


@on_cpu
def tokens_of(order: Tensor, offsets: Tensor, groups: Tensor) -> Tensor:
    """int64: the tokens of some groups, int64 `[g]`, by all tokens' order and where groups start."""
    return order[expand(torch.stack([offsets[:-1], offsets.diff()], 1)[groups])].long()


def bounds_of(counts: Tensor) -> Tensor:
    """int32 `[n + 1]`: where stretches of so many things begin, and where the last ends."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


@functools.lru_cache(maxsize=64)
@on_cpu
def sampled_entry(layout: TokenLayout, every: int) -> PatternIndex:
    """The entry of a head that sees global tokens, and one of so many keys of the grid, evenly spread.

    Where attention is flat, such keys stand for all of them, while the best blocks don't.
    """
    n, order = layout.seq_len, tile_order(layout, (1, None, None))
    first, place = order.global_before, order.coordinates
    taken = (place @ torch.tensor([5, 3, 1])) % every == 0
    grid = order.order[first : first + len(place)]
    rest = torch.cat([order.order[:first], order.order[first + len(place) :]])
    keys = torch.cat([rest, grid[taken], grid[~taken]])
    groups = groups_of(order, order.tile_offsets, GROUP)
    count = len(groups.owner)
    seen = torch.where(groups.owner < 0, n, len(rest) + int(taken.sum()))
    runs = torch.stack([torch.zeros_like(seen), seen], 1).int()
    rows = None if order.is_identity else order.order.int()
    offsets, starts = groups.offsets.int(), torch.arange(count + 1).int()
    return PatternIndex(n, n, rows, keys.int(), offsets, starts, runs)


def token_orders(layout: TokenLayout) -> tuple[Tile, ...]:
    """Tiles of about 64 tokens that a head's order is chosen from: cubes, lines through frames, flat ones."""
    frames = layout.grid[0]
    if frames == 1:
        return ((1, 8, 8), (1, 1, GROUP), (1, GROUP, 1))
    length = max(1, GROUP // frames)
    return ((4, 4, 4), (None, 1, length), (None, length, 1), (1, 8, 8))
