"""The offsets of a head by what they save, and the stencils that take the best of them.

A search scores a hundred candidates for every head and noise level, and takes one. Scoring needs no more of a
stencil than how many of the best offsets it takes, so it is built when it is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..patterns import Stencil
from .cells import CellTable
from .reach import MOST_RUNS, mean_benefit, nested_stencil, ranks


@dataclass(frozen=True, eq=False)
class Ranking:
    """The offsets of a head in one token order, best first.

    Args:
        statistics: What the head's sampled rows gave in that order, see `candidates.found`.
        benefit: What they are ranked by: the saved error with a far field (`"offset_far"`) or without one
            (`"offset_drop"`).
        table: The cells of the token order, at calibration.
        most_runs: How many row intervals a stencil may have, see `reach.nested_stencil`.
    """

    statistics: dict[str, Tensor]
    benefit: str
    table: CellTable
    most_runs: int = MOST_RUNS

    @functools.cached_property
    def offsets(self) -> Tensor:
        """The offsets between tiles that occur at calibration, int64 `[n, 3]`, best first.

        They are ordered by falling mean benefit, equal ones by distance. A tile's offset to itself comes
        first.
        """
        reach = self.table.counts - 1
        mean = mean_benefit(self.statistics[self.benefit], self.statistics["offset_count"])
        mean[tuple(reach.tolist())] = torch.inf
        places = torch.stack(torch.unravel_index(torch.arange(mean.numel()), mean.shape), 1) - reach
        nearest = places.square().sum(1).argsort(stable=True)
        order = nearest[mean.flatten()[nearest].argsort(descending=True, stable=True)]
        return places[order[mean.flatten()[order] > -torch.inf]]

    @functools.cached_property
    def _pairs(self) -> Tensor:
        """Density over the whole video of the first offset, the first two, and so on; float64 `[n]`."""
        counts = self.table.counts
        pairs = (counts - self.offsets.abs()).prod(1).double()
        return pairs.cumsum(0) / counts.prod().double() ** 2

    def within(self, budgets: Sequence[float]) -> tuple[int, ...]:
        """How many of the best offsets stay within each budget (density of the whole video), at least one."""
        limits = torch.tensor(budgets, dtype=torch.float64)
        return tuple(torch.searchsorted(self._pairs, limits, right=True).clamp_min(1).tolist())

    def members(self, counts: Sequence[int]) -> Tensor:
        """The relative tiles of the calibrated size that stencils of so many offsets see, bool `[k, L]`."""
        return self._near < torch.tensor(counts)[:, None]

    @functools.cached_property
    def _near(self) -> Tensor:
        """Places of the calibrated size's offsets, int32 `[L]`; those that don't occur come last."""
        size = 2 * self.table.counts - 1
        frames, rows, columns = (self.offsets + self.table.counts - 1).T
        place = torch.full((int(size.prod()),), len(self.offsets), dtype=torch.int32)
        flat = (frames * size[1] + rows) * size[2] + columns
        place[flat] = torch.arange(len(self.offsets), dtype=torch.int32)
        return place

    def stencil(self, counts: Sequence[int], number: int) -> Stencil:
        """The stencil of `counts[number]` offsets, nested with those of the other counts (ascending)."""
        near = self.table.counts - 1
        return nested_stencil(self._place, counts, number, near, self.most_runs)

    @functools.cached_property
    def _place(self) -> Tensor:
        """Places of offsets in a lattice that may be larger than the calibrated one, see `ranks`."""
        return ranks(self.statistics, self.benefit, self.offsets)
