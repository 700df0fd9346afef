"""Stencils that also say what a head sees at distances that the calibrated video doesn't have.

Rotary positions bring attention back at distances where their waves meet again: a head that looks at its
neighbours in 24 columns may look at its neighbours and 31 columns further in 32. Such offsets are taken up
from a run of more rows and columns (see `larger`), where they save as much error as those that are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..patterns import Stencil
from .steady import rounded

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


def whole_beyond(statistics: dict[str, Tensor]) -> bool:
    """Whether a head's sums of the larger video (`BEYOND`) are complete and of one shape, or all missing.

    Their shape is that of a lattice of offsets: three odd sizes.
    """
    found = [statistics[key] for key in BEYOND.values() if key in statistics]
    if not found:
        return True
    shape = found[0].shape
    odd = len(shape) == 3 and all(size % 2 for size in shape)
    return odd and len(found) == len(BEYOND) and all(value.shape == shape for value in found)


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
