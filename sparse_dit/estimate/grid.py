"""Lines over the grids of images and videos: MMInference's grid heads (https://arxiv.org/abs/2504.16083).

Sums over sampled rows, folded by the strides that the layout names, give the stride and the phases: nothing
of the size of rows times keys is made. Letters in shapes: L heads, N rows, M keys, C bins of 64 offsets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..entry import PatternIndex
from ..modalities import Modalities
from ..patterns.estimated import Grid
from .budget import candidates, local_bins, within
from .parts import by_rows
from .rows import BIN, CallRows, sample_rows
from .runs import slash_entries
from .sums import sampled_sums

Stride = Literal["row", "frame", "none"]
STRIDES: tuple[Stride, ...] = ("row", "frame", "none")


def key_lines(modalities: Modalities, stride: Stride) -> Tensor:
    """int64 `[M]`: the line of each key; keys of text, or without a stride all, are alone on theirs.

    A line is one place in the rows, or in the frames, of one clip. It is told from where a token lies in its
    frame, so that text between frames does no harm.
    """
    key = ("lines", stride)
    if key not in modalities.cache:
        line, free = torch.arange(modalities.length), modalities.length
        bases: dict[tuple[int, int], int] = {}
        for part in modalities.media if stride != "none" else ():
            period = part.row_period if stride == "row" else part.frame_period
            if (part.clip, period) not in bases:
                bases[part.clip, period] = free
                free += period
            place = torch.arange(part.stop - part.start) % part.frame_period
            line[part.start : part.stop] = bases[part.clip, period] + place % period
        modalities.cache[key] = line.unique(return_inverse=True)[1]
    return modalities.cache[key]


def frame_distance(modalities: Modalities) -> int:
    """Tokens from a frame to the next one, with the text between, as most frames have it; 0 for none."""
    found: Counter[int] = Counter()
    for one, two in zip(modalities.media, modalities.media[1:], strict=False):
        if one.clip == two.clip:
            found[two.start - one.start] += 1
    for part in modalities.media:
        if part.grid[0] > 1:
            found[part.frame_period] += part.grid[0] - 1
    return max(found, key=lambda n: (found[n], n), default=0)


def bin_lines(modalities: Modalities, bins: int) -> Tensor:
    """int64 `[C]`: which bins of 64 offsets repeat with the frames; 0 is the one with a row's own place."""
    distance, bin_ = frame_distance(modalities), torch.arange(bins)
    if distance < 2 * BIN:
        return bin_
    return (bin_ * BIN + BIN - 1) % distance // BIN


def grid_entries(
    q: Tensor,
    k: Tensor,
    call: CallRows,
    heads: Sequence[int],
    shape: Grid,
    scale: float,
    modalities: Modalities,
    keys: Tensor | None = None,
) -> list[PatternIndex]:
    """An index for each listed head.

    Args:
        q: `[B, H, N, D]`, any strides.
        k: `[B, num_kv_heads, M, D]`, any strides.
        call: Rows to sample from, and to count the cost of.
        heads: Which heads, ascending.
        shape: What lines, and how many.
        scale: Factor of the logits.
        modalities: Where images and videos lie; there is one.
        keys: Bool `[M]`: keys that may be chosen, whose number is the budget's length; None for all.
    """
    local, size = local_bins(shape.local) * BIN, (q.shape[2], k.shape[2])
    sample = sample_rows(call, shape.rows, shape.sampled)
    sums, half = (
        sampled_sums(q, k, rows, scale=scale, heads=heads, local=local)
        for rows in (sample, sample.every_other())
    )
    others = torch.cat([sums.columns - half.columns, sums.diagonals - half.diagonals], 2).sum(0)
    tried = []
    for stride in STRIDES[:2] if shape.horizontal else STRIDES:
        lines = _Lines(modalities, stride, call, shape, keys)
        found, _ = lines.choose(*half.means_of_all())
        tried.append(((others * found).sum(1), lines, *lines.choose(*sums.means_of_all())))
    pick = torch.stack([kept for kept, *_ in tried]).argmax(0).tolist()
    chosen = torch.stack([tried[n][2][head] for head, n in enumerate(pick)])
    entries = slash_entries(chosen, *size)
    if shape.horizontal:
        (full,) = slash_entries(torch.ones_like(chosen[:1]), *size)
        for head, n in enumerate(pick):
            on = tried[n][1].rows_on(tried[n][3][head], size[0])
            entries[head] = by_rows((entries[head], full), on.long())
    return entries


class _Lines:
    """Candidates of one stride: lines of keys, keys of text, and diagonals that repeat with the frames."""

    def __init__(
        self,
        modalities: Modalities,
        stride: Stride,
        call: CallRows,
        shape: Grid,
        keys: Tensor | None,
    ) -> None:
        self.call, self.shape = call, shape
        self.keys = key_lines(modalities, stride)
        first = int(self.keys.max()) + 1
        bins = -(-len(self.keys) // BIN)
        repeats = torch.arange(bins) if stride == "none" else bin_lines(modalities, bins)
        self.lines = torch.cat([self.keys, repeats + first])
        self.count = int(self.lines.max()) + 1
        self.sighted = torch.zeros(self.count, dtype=torch.bool)  # lines of images and videos
        for part in modalities.media:
            self.sighted[self.keys[part.start : part.stop]] = True
        self.never = self.sighted & (not shape.vertical)
        self.length = len(self.keys)
        if keys is not None:
            self.never[self.keys[~keys]] = True
            self.length = int(keys.sum())
        if not shape.slash:
            self.never[first:] = True

    def choose(self, columns: Tensor, diagonals: Tensor) -> tuple[Tensor, Tensor]:
        """Bool `[L, M + C]`, and the line of images or videos with the highest score, `[L]`."""
        shape, call = self.shape, self.call
        scores, costs, forced = candidates(
            columns, diagonals, call, sinks=shape.sinks, local=shape.local
        )
        lines = self.lines[~forced]
        cost = torch.zeros(self.count, dtype=torch.int64).index_add_(0, lines, costs[~forced])
        gain = torch.zeros(len(scores), self.count, dtype=torch.float64)
        gain.index_add_(1, lines, (scores * costs)[:, ~forced].double())
        score = (gain / cost.clamp_min(1)).float()
        best = score.masked_fill(~self.sighted, -torch.inf).argmax(1)
        budget = call.budget(shape.budget.keys(self.length))
        if shape.horizontal:
            budget -= max(self._pairs_on(line) for line in best)
        allowed = max(0, budget - int(costs[forced].sum()))
        cost = cost.masked_fill(self.never, allowed + 1)
        picked = within(score.masked_fill(self.never, -1), cost, self.never & False, allowed)
        chosen = picked[:, self.lines] | forced
        hidden = self.never[self.lines] & ~forced  # the rest goes to single columns and bins
        scores = scores.masked_fill(hidden, -1).masked_fill(chosen, torch.inf)
        return within(scores, costs.masked_fill(hidden, max(0, budget) + 1), forced, budget), best

    def rows_on(self, line: Tensor, num_queries: int) -> Tensor:
        """Bool `[N]`: the rows whose own key lies on a line."""
        return self.keys[self.call.offset :][:num_queries] == line

    def _pairs_on(self, line: Tensor) -> int:
        """Pairs of the rows whose own key lies on a line."""
        call = self.call
        on = self.keys[call.rows.long() + call.offset] == line
        return int((call.stop - call.start)[on].sum())
