"""Stencils that also say what a head sees at distances that the calibrated video doesn't have.

Rotary positions bring attention back at distances where their waves meet again: a head that looks at its
neighbours in 24 columns may look at its neighbours and 31 columns further in 32. Such offsets are taken up
from a run of more rows and columns (see `beyond`), where they save as much error as those that are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..patterns import Stencil
from .steady import rounded

MOST_RUNS = 512  # of a stencil with offsets beyond, 7 KB in a plan
PLAN_RUNS = 1 << 19  # of all such stencils in a plan: 15 MB with the runners-up
BEYOND = {"offset_far": "beyond_far", "offset_drop": "beyond_drop", "offset_count": "beyond_count"}


def ranks(statistics: dict[str, Tensor], benefit: str, ranked: Tensor) -> Tensor:
    """Place of every offset in the order in which stencils take them up, int64, a lattice of offsets.

    As large as the calibrated video's lattice of offsets, or as that of the run beyond, if there was one. An
    offset that no video of the calibrated size has is taken up with the first one there that saves no more
    error than it; one that wasn't looked at, like the nearest at the border.

    Args:
        statistics: Of a head in one token order.
        benefit: `"offset_far"` or `"offset_drop"`.
        ranked: The calibrated video's offsets, int64 `[n, 3]`, best first. What isn't among them has place n
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
    """Whether a head's sums of the run beyond are all there and of one lattice of offsets, or not at all."""
    found = [statistics[key] for key in BEYOND.values() if key in statistics]
    if not found:
        return True
    shape = found[0].shape
    odd = len(shape) == 3 and all(size % 2 for size in shape)
    return odd and len(found) == len(BEYOND) and all(value.shape == shape for value in found)


def runs_each(choices: int) -> int:
    """Runs that a stencil with offsets beyond may have, in a plan of so many choices of a pattern."""
    return min(MOST_RUNS, PLAN_RUNS // max(1, choices))


def nested_stencil(
    place: Tensor, counts: Sequence[int], number: int, near: Tensor, most_runs: int = MOST_RUNS
) -> Stencil:
    """The stencil of the offsets whose place is below `counts[number]`.

    Args:
        place: From `ranks`.
        counts: Ascending, of this stencil and those that it is nested with.
        number: Which.
        near: The greatest distances of the calibrated size, int64 `[3]`.
        most_runs: Of a stencil. One that had more takes its offsets that no video of the calibrated size has
            from the largest of the smaller ones that has no more.
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
    return Stencil(tuple(map(tuple, runs)), (frames, rows, columns))


def _beyond(reach: NDArray[np.int64], near: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which offsets up to the distances `reach` no video of the calibrated size has, a lattice."""
    far = np.zeros(2 * reach + 1, dtype=bool)
    for axis, (longest, known) in enumerate(zip(reach.tolist(), near.tolist(), strict=True)):
        distant = np.abs(np.arange(-longest, longest + 1)) > known
        far |= distant.reshape([-1 if axis == n else 1 for n in range(3)])
    return far


def _runs(members: NDArray[np.bool_], reach: NDArray[np.int64]) -> list[list[int]]:
    """The members of a lattice as a stencil's runs, `[n][4]`."""
    edge = np.diff(np.pad(members, ((0, 0), (0, 0), (1, 1))).astype(np.int8), axis=-1)
    first = np.nonzero(edge > 0)
    length = np.nonzero(edge < 0)[-1] - first[-1]
    return np.column_stack([np.stack(first, 1) - reach, length]).tolist()


def mean_benefit(total: Tensor, count: Tensor) -> Tensor:
    """Mean benefit of each offset, `rounded`, -inf where none was sampled."""
    return torch.where(count > 0, rounded(total / count.clamp_min(1)), -torch.inf)


def _stretched(lattice: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
    """A lattice whose border stands for all beyond, up to the distances `far`; which places are its own."""
    own = torch.ones((), dtype=torch.bool)
    for axis, (size, most) in enumerate(zip(lattice.shape, far.tolist(), strict=True)):
        distance = torch.arange(-most, most + 1)
        reach = size // 2
        lattice = lattice.index_select(axis, distance.clamp(-reach, reach) + reach)
        own = own[..., None] & (distance.abs() <= reach)
    return lattice, own


def _scale(near: Tensor, wide: Tensor) -> Tensor:
    """By how much more an offset saves in the calibrated video than in the run beyond: over those that both
    have, less the own tile, as fewer frames change most what that saves."""
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
