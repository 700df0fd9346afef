"""Intercepts attention while the stock pipeline runs, and evaluates sampled rows of each head.

A `Recorder` takes in a run of the calibrated video. `profile_larger` takes in one forward of a video of
more rows and columns and fewer frames, which has about as many tokens but greater distances between them:
what heads do at those matters in larger videos, see `ranking`. It is measured at the highest noise level
and taken to hold at all of them, as the distances at which rotary positions bring attention back don't
depend on the noise. That run ends after the forward: nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..autocast import in_own_dtypes
from ..call import AttentionCall, StepContext
from ..generation import Case
from ..integrations import attached, components, workload
from ..layout import Tile, TokenLayout
from ..timing import Timer
from .candidates import tilings
from .cells import CellSums, check_finite, sample_rows
from .dependence import add_rows
from .nested import Cells
from .profile import HALF, LATER, ComponentProfile, Profile
from .projection import projections
from .ranking import BEYOND
from .sampling import each_sum, items_of, whole_layout
from .statistics import LayerStatistics, discover, empty_statistics, score

PICTURE = 96
Use = Callable[[range, Cells, CellSums], None]  # for some heads and what was summed by


class Recorder:
    """An intercept that records one profiling run and returns what stock attention computes.

    `keep` adds the run to the profile. Each run is summed on its own and then added, as the files of several
    processes are, so both ways give the same result to the last bit.

    Args:
        profile: The profile of the runs before, which the run is added to.
        phase: `"find"`, `"score"`, or `"both"` on different rows of the same calls; that is summed in
            `profile` itself, without `keep`.
        rows: How many query rows of each call are sampled.
        seed: The seed by which rows are sampled.
        turns: Steps to record and the half of guidance at each, see `sampling.turns`; all if None. A
            pipeline that has no halves is recorded whole at these steps.
        projections: For each layer `[H, D, D]` that values are multiplied by, so that errors are those
            behind the output projection; see `projections`.

    Attributes:
        run: The profile of this run alone; it shares the noise levels and layers of `profile`.
        seconds, wall: What recording took; see `Taken`.
    """

    def __init__(
        self,
        profile: ComponentProfile,
        phase: str,
        rows: int,
        seed: int,
        *,
        turns: Mapping[int, str] | None = None,
        projections: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.profile = profile
        alone = replace(profile, found={}, beyond={}, scores={}, looks={})
        self.run = profile if phase == "both" else alone
        self.phase = phase
        self.rows = rows
        self.turns = turns
        self.projections = projections or {}
        self.generator = torch.Generator().manual_seed(seed)
        self.seconds = 0.0
        self.wall = 0.0

    def __call__(self, call: AttentionCall) -> Tensor:
        layout, sigma = whole_layout(call), call.context.sigma
        if layout is not None and sigma is not None and self._due(call.context):
            timer = Timer(call.q.device)
            self.record(call, layout, sigma)
            taken = timer.stop()
            self.seconds += taken.seconds
            self.wall += taken.wall
        return call.stock()

    def keep(self) -> None:
        """Add the run to the profile; to be called once, when it is over."""
        self.profile.add(self.run)

    def _due(self, context: StepContext) -> bool:
        """Whether this forward is to be recorded."""
        if self.turns is None:
            return True
        half = self.turns.get(context.step)
        return half is not None and context.branch in ("any", half)

    @in_own_dtypes
    def record(self, call: AttentionCall, layout: TokenLayout, sigma: float) -> None:
        """Add sampled rows of a call of this layout, which `whole_layout` gave, at its noise level."""
        profile = self.profile
        profile.note_layout(layout)
        self.run.layout = profile.layout
        level = self._level(sigma)
        if call.layer not in profile.layers:
            profile.layers.append(call.layer)
        orders: list[Cells] = [(tile, None) for tile in tilings(layout)]
        for phase in ("find", "score"):
            if self.phase not in (phase, "both"):
                continue
            rows = sample_rows(layout, self.rows, self.generator)
            if phase == "find":
                use, wanted = self._finding(level, call.layer), orders
            else:
                use, wanted = self._scoring(level, call.layer, orders)
            for item in items_of(call, layout):
                each_sum(item, rows, self.projections.get(call.layer), wanted, layout, use)

    def _level(self, sigma: float) -> int:
        """Place of a noise level among the recorded ones; while finding, new ones are added."""
        sigmas = self.profile.sigmas
        if self.phase == "score":
            return self.profile.nearest_level(sigma)
        for level, known in enumerate(sigmas):
            if abs(known - sigma) < 1e-4:
                return level
        if sigmas and sigma > sigmas[-1]:
            raise ValueError(f"noise levels must fall over a run, got {sigma:.4f} after {sigmas}")
        sigmas.append(sigma)
        return len(sigmas) - 1

    def _finding(self, level: int, layer: str) -> Use:
        """What is done with the sums of some heads in one token order while finding."""
        run, layout = self.run, self.run.known_layout
        orders = tilings(layout)
        if (level, layer) not in run.found:
            run.found[level, layer] = empty_statistics(layout, orders, run.heads[layer][0])
        found = run.found[level, layer]

        def use(heads: range, cells: Cells, sums: CellSums) -> None:
            tile, _ = cells
            discover(found[tile], heads, sums, layout, tile)
            if tile == orders[0]:
                check_finite(sums, layer, heads, run.sigmas[level])
                add_rows(run, HALF, level, layer, heads, sums)

        return use

    def _scoring(self, level: int, layer: str, orders: list[Cells]) -> tuple[Use, list[Cells]]:
        """What is done with the sums of some heads over some cells while scoring, and which cells."""
        run, layout = self.run, self.run.known_layout
        candidates = self.profile.candidates(level, layer)
        kinds = candidates[0].kinds
        if (level, layer) not in run.scores:
            num_heads, _ = run.heads[layer]
            shape = (num_heads, len(kinds))
            run.scores[level, layer] = {
                **{
                    key: torch.zeros(shape, dtype=torch.float32)
                    for key in ("error", "error_squared", "recall")
                },
                **{key: torch.zeros(num_heads, dtype=torch.float32) for key in ("norm", "rows")},
            }
        scores = run.scores[level, layer]
        dense = torch.tensor([kind.is_dense for kind in kinds])

        def use(heads: range, cells: Cells, sums: CellSums) -> None:
            some = slice(heads.start, heads.stop)
            of_heads = {name: values[some] for name, values in scores.items()}
            for where, error, square, recall in score(sums, cells, candidates[some], layout):
                of_heads["error"][:, where] += error
                of_heads["error_squared"][:, where] += square
                of_heads["recall"][:, where] += recall
            if cells == orders[0]:
                check_finite(sums, layer, heads, run.sigmas[level])
                of_heads["recall"][:, dense] += sums.out.shape[1]
                of_heads["norm"] += sums.out.square().sum((1, 2)).cpu()
                of_heads["rows"] += sums.out.shape[1]
                add_rows(run, LATER, level, layer, heads, sums)
            if cells in orders and level == len(run.sigmas) // 2:
                self._picture(layer, cells[0], heads, sums)

        return use, list(dict.fromkeys([*orders, *candidates[0].cells]))

    def _picture(self, layer: str, tile: Tile, heads: range, sums: CellSums) -> None:
        """Attention of the sampled rows over tiles, both in tile order, at most 96 x 96."""
        image = sums.mass[:, sums.cell.argsort(stable=True)]
        size = (min(PICTURE, image.shape[1]), min(PICTURE, image.shape[2]))
        image = torch.nn.functional.adaptive_avg_pool2d(image, size).cpu()
        pictures, (count, _) = self.profile.pictures, self.profile.heads[layer]
        if (layer, tile) not in pictures:
            fresh = torch.zeros(count, *size, dtype=torch.float32)
            pictures.setdefault((layer, tile), fresh)  # heads come in parallel
        if image.shape[1:] == pictures[layer, tile].shape[1:]:
            pictures[layer, tile][heads.start : heads.stop] = image


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
        projection: For each layer name what the heads' values are multiplied by, see `projections`.
    """

    def __init__(
        self, profile: ComponentProfile, rows: int, seed: int, projection: Mapping[str, Tensor]
    ) -> None:
        self.profile, self.rows, self.projection = profile, rows, projection
        self.generator = torch.Generator().manual_seed(seed)
        self.tiles = tilings(profile.known_layout)
        self.found: dict[str, LayerStatistics] = {}

    def __call__(self, call: AttentionCall) -> Tensor:
        layout, wanted = whole_layout(call), call.layer in self.profile.layers
        if layout is not None and wanted and call.layer not in self.found:
            self._add(call, layout)
        return call.stock()

    @in_own_dtypes
    def _add(self, call: AttentionCall, layout: TokenLayout) -> None:
        rows = sample_rows(layout, self.rows, self.generator)
        heads, _ = self.profile.heads[call.layer]
        self.found[call.layer] = found = empty_statistics(layout, self.tiles, heads)
        projection = self.projection.get(call.layer)

        def add(some: range, cells: Cells, sums: CellSums) -> None:
            if cells[0] == self.tiles[0]:  # the output is the same in all orders
                check_finite(sums, call.layer, some, call.context.sigma)
            discover(found[cells[0]], some, sums, layout, cells[0])

        for item in items_of(call, layout):
            each_sum(item, rows, projection, [(tile, None) for tile in self.tiles], layout, add)

    def keep(self, profile: ComponentProfile) -> None:
        """Add the sums over offsets to a profile."""
        for layer, found in self.found.items():
            profile.beyond[layer] = {
                tile: {name: statistics[name] for name in BEYOND}
                for tile, statistics in found.items()
            }
        profile._candidates.clear()
