"""A pattern index as the Gluon kernel reads it: tiles of neighbouring query tokens, and each one's steps.

A step is `block_n` neighbouring keys, which one TMA load brings: tokens, or pooled keys. Steps are laid over
the runs of a list one after the other, each from the first key that none covers yet, so that a step may hold
more runs than one; bits say which of its keys the list has. Which keys those are is all that a step needs to
be told: how much a pooled key weighs, and whether padding ends in it, stands beside the pooled keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...index import PatternIndex
from ...intervals import RowIntervals
from ...on_cpu import on_cpu
from ..triton.tables import Extents, bands, extents_of, lists_of, ranks

# head; first query token, rows; first step, first that isn't plain, first masked, end; first pooled key
TILE_FIELDS = 8
LIST_FIELDS = slice(1, 7)  # what a pattern's heads share of these
SHORT = 32  # tokens: lists of runs that are shorter in the mean, and such rows, aren't looked at further
FEW = 4  # runs of a list, for text and the like, that may be short
TILE_KEYS = 128.0  # what a tile costs besides its steps, in keys
ALL = (1 << 32) - 1  # keys of a word
PLAIN, POOLED, MASKED = range(3)  # kinds of steps, in this order


@dataclass(frozen=True, eq=False)
class Tables:
    """One pattern's tables on the CPU. Letters: T tiles, S steps, X masks.

    Args:
        tiles: int64 `[T, 6]`, `LIST_FIELDS` of a tile.
        steps: int32 `[S, 2]`: the first key; twice the number of its mask, and 1 more if keys are pooled.
        masks: int32 `[X, block_n / 32]`: bits of the keys that are seen; the first are all.
        cost: float64 `[T]`: steps of each tile, and what a tile costs besides.
    """

    tiles: Tensor
    steps: Tensor
    masks: Tensor
    cost: Tensor


def tables_of(
    entry: PatternIndex, block_m: int, block_n: int, rows: RowIntervals | None = None
) -> Tables | None:
    """Tables of `entry`, made once; None where its tokens or runs are scattered.

    Args:
        entry: The pattern index, on any device.
        block_m, block_n: Rows of a tile and keys of a step.
        rows: The index's own intervals; steps that no row of a tile sees are left out.
    """
    name = ("gluon", block_m, block_n, rows)
    if name not in entry.cache:
        entry.cache[name] = _build(entry.to("cpu"), block_m, block_n, rows and rows.to("cpu"))
    return entry.cache[name]


@dataclass(frozen=True, eq=False)
class _Cover:
    """Steps of lists, in order of lists and keys: list and first key `[S]`, bits of keys `[S, words]`."""

    owner: Tensor
    first: Tensor
    words: Tensor


@on_cpu
def _build(
    entry: PatternIndex, block_m: int, block_n: int, within: RowIntervals | None
) -> Tables | None:
    first = bands(entry)
    rows = _row_ranges(entry, first, block_m)
    if rows is None:
        return None
    runs, owner = _runs(entry, first)
    if (len(runs) - FEW * len(first)) * SHORT > int(runs[:, 1].sum()):
        return None
    position, token, count, band = rows
    exact = _cover(runs, owner, len(first), block_n)
    pooled = None
    if entry.far is not None:
        cells, counts = lists_of(entry.far.runs, entry.far.run_offsets, first)
        of = torch.repeat_interleave(torch.arange(len(first)), counts)
        pooled = _cover(cells, of, len(first), block_n)
    if within is None:
        steps, bounds, masks = _in_kinds(exact, pooled, len(first), block_n, masked=False)
        bounds = bounds[band]
    else:
        extents = extents_of(entry, within, position, count)
        exact, plain = _within(_for_tiles(exact, band), extents, block_n)
        pooled = pooled and _for_tiles(pooled, band)
        steps, bounds, masks = _in_kinds(
            exact, pooled, len(band), block_n, masked=True, plain=plain
        )
    tiles = torch.cat([token[:, None], count[:, None], bounds], 1)
    return Tables(tiles, steps, masks, (bounds[:, 3] - bounds[:, 0]) + TILE_KEYS / block_n)


def _row_ranges(
    entry: PatternIndex, first: Tensor, block_m: int
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Tiles: sorted position and token of the first row, rows, and whose list; None for scattered tokens."""
    starts = entry.q_offsets.long()[first]
    cuts = torch.cat([starts, _breaks(entry.query_tokens)]).unique()
    sizes = torch.cat([cuts[1:], torch.tensor([entry.num_queries])]) - cuts
    if len(cuts) - len(first) > entry.num_queries // SHORT:
        return None
    of, rank = ranks((sizes + block_m - 1) // block_m)
    position = cuts[of] + rank * block_m
    band = torch.searchsorted(starts, position, right=True) - 1
    return (
        position,
        entry.query_tokens[position],
        (sizes[of] - rank * block_m).clamp_max(block_m),
        band,
    )


def _breaks(tokens: Tensor) -> Tensor:
    """Sorted positions whose token doesn't follow the one before."""
    return (tokens.diff() != 1).nonzero()[:, 0] + 1


def _runs(entry: PatternIndex, first: Tensor) -> tuple[Tensor, Tensor]:
    """Runs of key tokens, start and length, ascending in each list; and the list of each."""
    runs, counts = lists_of(entry.runs, entry.run_offsets, first)
    owner = torch.repeat_interleave(torch.arange(len(first)), counts)
    if entry.k_order is None:
        return runs, owner
    tokens = entry.key_tokens
    cuts = torch.cat([torch.tensor([0]), _breaks(tokens), torch.tensor([len(tokens)])])
    start, end = runs[:, 0].contiguous(), runs.sum(1)
    low = torch.searchsorted(cuts, start, right=True) - 1
    of, rank = ranks(torch.searchsorted(cuts, end) - low)
    piece = low[of] + rank
    begin = torch.maximum(start[of], cuts[piece])
    length = torch.minimum(end[of], cuts[piece + 1]) - begin
    order = (owner[of] * len(tokens) + tokens[begin]).argsort()
    return torch.stack([tokens[begin], length], 1)[order], owner[of][order]


def _cover(runs: Tensor, owner: Tensor, lists: int, block: int) -> _Cover:
    """Steps over ascending runs: each begins at the first key that no step before it covers."""
    counts = torch.bincount(owner, minlength=lists)
    begin = counts.cumsum(0) - counts
    covered = torch.zeros(lists, dtype=torch.int64)
    found = []
    for turn in range(int(counts.max())):
        mine = (counts > turn).nonzero()[:, 0]
        start, length = runs[begin[mine] + turn].unbind(1)
        end = start + length
        start = torch.maximum(start, covered[mine])
        more = (end - start).clamp_min(0).add(block - 1) // block
        covered[mine] = torch.where(more > 0, start + more * block, covered[mine])
        of, rank = ranks(more)
        found.append(torch.stack([mine[of], start[of] + rank * block], 1))
    of, first = torch.cat([torch.zeros(0, 2, dtype=torch.int64), *found]).unbind(1)
    far = int(runs.sum(1).max()) + block if len(runs) else 1
    order = (of * far + first).argsort()
    of, first = of[order], first[order]
    return _Cover(of, first, _bits(runs, owner, of * far + first, far, block))


def _bits(runs: Tensor, owner: Tensor, steps: Tensor, far: int, block: int) -> Tensor:
    """Keys of each step that runs have, int64 `[S, block / 32]`; `steps` is list times `far` plus key."""
    start = owner * far + runs[:, 0]
    end = start + runs[:, 1]
    low = torch.searchsorted(steps, start, right=True) - 1
    of, rank = ranks(torch.searchsorted(steps, end) - low)
    step = low[of] + rank
    word = torch.arange(block // 32) * 32
    a, b = (((x[of] - steps[step])[:, None] - word).clamp(0, 32) for x in (start, end))
    bits = (torch.ones_like(b) << b) - (torch.ones_like(a) << a)
    return torch.zeros(len(steps), len(word), dtype=torch.int64).index_add_(0, step, bits)


def _for_tiles(cover: _Cover, band: Tensor) -> _Cover:
    """A list's steps for each tile that has it."""
    counts = torch.bincount(cover.owner, minlength=int(band.max()) + 1)
    begin = counts.cumsum(0) - counts
    of, rank = ranks(counts[band])
    step = begin[band][of] + rank
    return _Cover(of, cover.first[step], cover.words[step])


def _within(cover: _Cover, extents: Extents, block: int) -> tuple[_Cover, Tensor]:
    """The steps that some row may see, and which of those all rows see whole, as far as intervals go."""
    all_start, all_stop, any_start, any_stop = (x[cover.owner] for x in extents)
    last = cover.first + block
    kept = (cover.first < any_stop) & (last > any_start)
    plain = (cover.first >= all_start) & (last <= all_stop)
    return _Cover(cover.owner[kept], cover.first[kept], cover.words[kept]), plain[kept]


def _in_kinds(
    exact: _Cover,
    pooled: _Cover | None,
    lists: int,
    block: int,
    *,
    masked: bool,
    plain: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps by list and kind as of `Tables`, where kinds begin and end in them `[lists, 4]`, and masks.

    A list of no steps gets one of which no key is seen.
    """
    covers = [exact] if pooled is None else [exact, pooled]
    owner, first, words = (
        torch.cat([getattr(c, name) for c in covers]) for name in ("owner", "first", "words")
    )
    far = torch.arange(len(owner)) >= len(exact.owner)
    whole = (words == ALL).all(1)
    kind = torch.where(whole, torch.where(far, MASKED if masked else POOLED, PLAIN), MASKED)
    if plain is not None:
        kind[: len(plain)][~plain] = MASKED
    none = (torch.bincount(owner, minlength=lists) == 0).nonzero()[:, 0]
    owner, kind = torch.cat([owner, none]), torch.cat([kind, torch.full_like(none, MASKED)])
    first, far = torch.cat([first, none * 0]), torch.cat([far, none < 0])
    words = torch.cat([words, words.new_zeros(len(none), words.shape[1])])
    part = (words != ALL).any(1)
    masks, others = words[part].unique(dim=0, return_inverse=True)
    masks = torch.cat([torch.full((1, block // 32), ALL), masks])
    number = torch.zeros_like(first)
    number[part] = others + 1
    order = (owner * 3 + kind).argsort(stable=True)
    ends = torch.bincount(owner * 3 + kind, minlength=lists * 3).cumsum(0).view(lists, 3)
    begin = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1, 2]])
    steps = torch.stack([first, number * 2 + far], 1)[order]
    masks = torch.where(masks >= 1 << 31, masks - (1 << 32), masks)
    return steps.int(), torch.cat([begin[:, None], ends], 1), masks.int()
