"""One forward of a video of more rows and columns than the calibrated one, and fewer frames.

It has about as many tokens, but greater distances between them. What heads do at distances that the
calibrated video doesn't have matters in larger videos: see `reach`. It is measured at the highest noise
level and taken to hold at all of them, as the distances at which rotary positions bring attention back don't
depend on the noise. The run ends after that forward: nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..autocast import in_own_dtypes
from ..call import AttentionCall
from ..generation import Case
from ..integrations import attached, components, workload
from ..layout import TokenLayout
from .candidates import tilings
from .cells import CellSums, check_finite, sample_rows
from .nested import Cells
from .parallel_map import each_sum
from .profile import ComponentProfile, Profile
from .projection import projections
from .reach import BEYOND
from .sampling import items_of, whole_layout
from .statistics import HeadStatistics, discover, empty_heads


def profile_larger(
    pipe: Any, profile: Profile, case: Case, say: Callable[[str], None] | None = None
) -> None:
    """Add to a profile what every head does at greater distances than the calibrated video has.

    It is measured in one forward of a larger video, see `Workload.larger`, and added at all noise levels. If
    the pipeline makes no such video, the profile stays as it is: what holds at the calibrated video's
    greatest distances then stands for all greater ones.

    Args:
        pipe: A diffusers pipeline of a supported class, not patched.
        profile: The profile of that pipeline, with the runs that find where heads look. It is changed in
            place.
        case: The prompt and seed of the forward.
        say: Called with one line that says why, if there is nothing to be added.
    """
    work = workload(pipe, profile.settings).larger()
    tell = say or (lambda text: None)
    if work is None:
        tell("the pipeline makes no fewer frames, so greater distances aren't looked at")
        return
    modules = components(pipe)
    intercepts = {
        name: _LargerProfile(part, profile.rows, case.seed, projections(modules[name]))
        for name, part in profile.components.items()
    }
    with attached(pipe, intercepts):
        try:
            _, taken = work.run(case, lambda _: all(i.found for i in intercepts.values()))
        except ValueError as error:
            tell(f"greater distances can't be looked at: {error}")
            return
    profile.seconds += taken.seconds
    for name, intercept in intercepts.items():
        intercept.keep(profile.components[name])


class _LargerProfile:
    """An intercept that sums the benefits of offsets in the first forward of a larger video.

    Args:
        profile: The component's profile at the calibrated size; it says which layers and token orders.
        rows: How many query rows of each call are sampled.
        seed: The seed by which rows are sampled.
        behind: For each layer name what the heads' values are multiplied by, see `projections`.
    """

    def __init__(
        self, profile: ComponentProfile, rows: int, seed: int, behind: Mapping[str, Tensor]
    ) -> None:
        self.profile, self.rows, self.behind = profile, rows, behind
        self.generator = torch.Generator().manual_seed(seed)
        self.tiles = tilings(profile.known_layout)
        self.found: dict[str, list[HeadStatistics]] = {}

    def __call__(self, call: AttentionCall) -> Tensor:
        layout, wanted = whole_layout(call), call.layer in self.profile.layers
        if layout is not None and wanted and call.layer not in self.found:
            self._add(call, layout)
        return call.stock()

    @in_own_dtypes
    def _add(self, call: AttentionCall, layout: TokenLayout) -> None:
        rows = sample_rows(layout, self.rows, self.generator)
        self.found[call.layer] = heads = empty_heads(
            layout, self.tiles, self.profile.heads[call.layer][0]
        )
        behind = self.behind.get(call.layer)

        def add(head: int, cells: Cells, sums: CellSums) -> None:
            if cells[0] == self.tiles[0]:  # the output is the same in all orders
                check_finite(sums, call.layer, head, call.context.sigma)
            discover(heads[head][cells[0]], sums, layout, cells[0])

        for item in items_of(call, layout):
            each_sum(item, rows, behind, [(tile, None) for tile in self.tiles], layout, add)

    def keep(self, profile: ComponentProfile) -> None:
        """Add the sums over offsets to the statistics of a profile, at all its noise levels."""
        for (_, layer), known in profile.found.items():
            if layer not in self.found:
                continue
            for mine, head in zip(known, self.found[layer], strict=True):
                for tile, statistics in head.items():
                    mine[tile] |= {BEYOND[name]: statistics[name] for name in BEYOND}
        profile._candidates.clear()
