"""The offsets of a head by what they save, and the stencils that take the best of them.

A search scores a hundred candidates for every head and noise level, and takes one. Scoring needs no more of
a stencil than how many of the best offsets it takes, so it is built when it is asked for.

What is ranked are sums of float32 products. Their last bits depend on the machine, on the number of threads
and on the order in which they were added, so ranks don't hang on them: otherwise two processes could choose
other places for the same head.

Stencils also say what a head sees at distances that the calibrated video doesn't have. Rotary positions
bring attention back at distances where their waves meet again: a head that looks at its neighbours in 24
columns may look at its neighbours and 31 columns further in 32. Such offsets are taken up from a run of
more rows and columns (see `profile_larger`), where they save as much error as those that are chosen.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..patterns import Stencil
from .cells import CellTable

BITS = 16  # of 24 that float32 has


def rounded(values: Tensor) -> Tensor:
    """Floating-point `values` to 16 significant bits; what isn't finite stays as it is."""
    mantissa, exponent = torch.frexp(values)
    short = torch.ldexp((mantissa * 2**BITS).round(), exponent - BITS)
    return torch.where(values.isfinite(), short, values)


def best_first(values: Tensor) -> Tensor:
    """Places along the last axis by falling value, int64; of values that are equal but for their last bits
    the first one comes first."""
    return rounded(values).argsort(dim=-1, descending=True, stable=True)


MOST_RUNS = 512  # row intervals of a stencil with far offsets, 7 KB in a plan
PLAN_RUNS = 1 << 19  # row intervals of all such stencils in a plan: 15 MB with the runners-up
BEYOND = {"offset_far": "beyond_far", "offset_drop": "beyond_drop", "offset_count": "beyond_count"}


def ranks(statistics: dict[str, Tensor], benefit: str, ranked: Tensor) -> Tensor:
    """Rank of every offset in the order in which stencils take them up, int64, a lattice of offsets.

    The lattice is that of the calibrated video, or the union with that of the larger one, if one was
    profiled. An offset that no video of the calibrated size has takes the rank of the first offset there that
    saves no more error than it does. An offset that neither video has takes the rank of the nearest one at
    the border.

    Args:
        statistics: The sums over offsets of one head in one token order.
        benefit: `"offset_far"` or `"offset_drop"`: the saved error with a far field or without one.
        ranked: The calibrated video's offsets, int64 `[n, 3]`, best first. What isn't among them has rank n
            or a greater one.
    """
    shape = statistics["offset_count"].shape
    reach = torch.tensor(shape) // 2
    order = tuple((ranked + reach).T)
    place = torch.full(shape, len(ranked))
    place[order] = torch.arange(len(ranked))
    if BEYOND[benefit] not in statistics:
        return place
    near = mean_benefit(statistics[benefit], statistics["offset_count"])
    wide = mean_benefit(statistics[BEYOND[benefit]], statistics[BEYOND["offset_count"]])
    far = torch.maximum(reach, torch.tensor(wide.shape) // 2)
    at_border, calibrated = _stretched(place, far)
    value, _ = _stretched(rounded(wide * _scale(near, wide)), far)
    falling = near[order]
    falling[0] = falling.max()  # the own tile, which is first whatever it saves
    taken = torch.searchsorted(-falling, -value)
    return torch.where(calibrated | value.isneginf(), at_border, taken)


def whole_beyond(statistics: Mapping[str, Tensor], heads: int) -> bool:
    """Whether a layer's sums of the larger video are those of `BEYOND`, of one shape, and of all heads.

    Their shape is that of a lattice of offsets: three odd sizes.
    """
    if set(statistics) != set(BEYOND):
        return False
    lattice = statistics["offset_count"].shape
    shapes = {name: value.shape for name, value in statistics.items() if name != "offset_count"}
    odd = len(lattice) == 3 and all(size % 2 for size in lattice)
    return odd and all(shape == (heads, *lattice) for shape in shapes.values())


def runs_each(choices: int) -> int:
    """The row intervals that a stencil with far offsets may have, in a plan of `choices` patterns."""
    return min(MOST_RUNS, PLAN_RUNS // max(1, choices))


def nested_stencil(
    place: Tensor, counts: Sequence[int], number: int, near: Tensor, most_runs: int = MOST_RUNS
) -> Stencil:
    """The stencil of the offsets whose rank is below `counts[number]`.

    Args:
        place: The rank of every offset, from `ranks`.
        counts: The numbers of offsets of this stencil and of those that it is nested with, rising.
        number: Which of `counts` the stencil has.
        near: The greatest distances of the calibrated size in tiles of frames, rows and columns, int64 `[3]`.
        most_runs: How many row intervals a stencil may have. One that had more takes the offsets that no
            video of the calibrated size has from the largest smaller stencil that stays within it.
    """
    order, count = place.numpy(), counts[number]
    reach = np.array(order.shape) // 2
    runs = _runs(order < count, reach)
    if len(runs) > most_runs:
        smaller = sorted(set(counts[:number]), reverse=True)
        fits = (n for n in smaller if len(_runs(order < n, reach)) <= most_runs)
        far = _beyond(reach, near.numpy())
        runs = _runs(order < np.where(far, next(fits, 0), count), reach)
    frames, rows, columns = reach.tolist()
    return Stencil(tuple((a, b, c, length) for a, b, c, length in runs), (frames, rows, columns))


def _beyond(reach: NDArray[np.int64], near: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which offsets up to the distances `reach` no video of the calibrated size has, a bool lattice."""
    far = np.zeros(2 * reach + 1, dtype=bool)
    for axis, (longest, known) in enumerate(zip(reach.tolist(), near.tolist(), strict=True)):
        distant = np.abs(np.arange(-longest, longest + 1)) > known
        far |= distant.reshape([-1 if axis == n else 1 for n in range(3)])
    return far


def _runs(members: NDArray[np.bool_], reach: NDArray[np.int64]) -> list[list[int]]:
    """The members of a lattice as row intervals `[n][4]` of a stencil: the first offset, and the length."""
    edge = np.diff(np.pad(members, ((0, 0), (0, 0), (1, 1))).astype(np.int8), axis=-1)
    first = np.nonzero(edge > 0)
    length = np.nonzero(edge < 0)[-1] - first[-1]
    return np.column_stack([np.stack(first, 1) - reach, length]).tolist()


def mean_benefit(total: Tensor, count: Tensor) -> Tensor:
    """Mean benefit of each offset, `rounded`, -inf where none was sampled."""
    return torch.where(count > 0, rounded(total / count.clamp_min(1)), -torch.inf)


def _stretched(lattice: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
    """A lattice extended to the distances `far` by repeating its border; which places aren't repeated."""
    own = torch.ones((), dtype=torch.bool)
    for axis, (size, most) in enumerate(zip(lattice.shape, far.tolist(), strict=True)):
        distance = torch.arange(-most, most + 1)
        reach = size // 2
        lattice = lattice.index_select(axis, distance.clamp(-reach, reach) + reach)
        own = own[..., None] & (distance.abs() <= reach)
    return lattice, own


def _scale(near: Tensor, wide: Tensor) -> Tensor:
    """How many times more error offsets save in the calibrated video than in the larger one, a scalar.

    It is the ratio of the sums over the offsets that both have, without the query's own tile: with fewer
    frames what that saves changes most.
    """
    middles = [torch.tensor(x.shape) // 2 for x in (near, wide)]
    least = torch.minimum(*middles).tolist()
    near, wide = (
        x[tuple(slice(m - n, m + n + 1) for m, n in zip(middle.tolist(), least, strict=True))]
        for x, middle in zip((near, wide), middles, strict=True)
    )
    both = (near > 0) & (wide > 0)
    both[tuple(least)] = False
    total = wide[both].sum()
    return near[both].sum() / total if total > 0 else torch.ones((), dtype=torch.float32)


@functools.lru_cache(maxsize=16)
def _by_distance(reach: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The offsets up to the distances `reach`, int64 `[L, 3]`, and their numbers by distance, `[L]`."""
    axes = [torch.arange(-most, most + 1) for most in reach]
    places = torch.cartesian_prod(*axes)
    return places, places.square().sum(1).argsort(stable=True)


@dataclass(frozen=True, eq=False)
class Ranking:
    """The offsets of a head in one token order, best first.

    Args:
        statistics: What the head's sampled rows gave in that order, see `candidates.found`.
        benefit: What they are ranked by: the saved error with a far field (`"offset_far"`) or without one
            (`"offset_drop"`).
        table: The cells of the token order, at calibration.
        most_runs: How many row intervals a stencil may have, see `ranking.nested_stencil`.
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
        places, nearest = _by_distance(tuple(reach.tolist()))
        ranked, order = mean.flatten()[nearest].sort(descending=True, stable=True)
        return places[nearest[order[ranked > -torch.inf]]]

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
