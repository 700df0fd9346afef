"""Intercepts attention while the stock pipeline runs, and evaluates sampled rows of each head."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from ..integrations.call import AttentionCall, StepContext
from ..layout import Tile, TokenLayout
from .candidates import tilings
from .cells import CellSums, sample_rows
from .dependence import look
from .profile import HALF, LATER, ComponentProfile
from .sampling import Item, items_of, whole_layout
from .seen import Cells, cells_of
from .side_by_side import each_head
from .statistics import HeadStatistics, discover, empty_heads, score, sums_of

PICTURE = 96


class Recorder:
    """An intercept that records into a profile and returns what stock attention computes.

    Args:
        profile: Where to record.
        phase: `"find"` or `"score"`.
        rows: Sampled rows for each call.
        seed: Of the sampling.
        turns: Steps to record and the half of guidance at each, see `sampling.turns`; all if None. A
            pipeline that has no halves is recorded whole at these steps.
        projections: For each layer `[H, D, D]` that values are multiplied by, so that errors are those
            behind the output projection; see `projections`.

    Attributes:
        seconds: Spent on recording.
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
        self.phase = phase
        self.rows = rows
        self.turns = turns
        self.projections = projections or {}
        self.generator = torch.Generator().manual_seed(seed)
        self.seconds = 0.0

    def __call__(self, call: AttentionCall) -> Tensor:
        layout, sigma = whole_layout(call), call.context.sigma
        if layout is not None and sigma is not None and self._due(call.context):
            started = time.perf_counter()
            self._record(call, layout, sigma)
            self.seconds += time.perf_counter() - started
        return call.stock()

    def _due(self, context: StepContext) -> bool:
        """Whether this forward is to be recorded."""
        if self.turns is None:
            return True
        half = self.turns.get(context.step)
        return half is not None and context.branch in ("any", half)

    def _record(self, call: AttentionCall, layout: TokenLayout, sigma: float) -> None:
        profile = self.profile
        profile.note_layout(layout)
        level = self._level(sigma)
        if call.layer not in profile.layers:
            profile.layers.append(call.layer)
        rows = sample_rows(layout, self.rows, self.generator)
        finding = self.phase == "find"
        record = self._find if finding else self._score
        behind = self.projections.get(call.layer)
        cells: dict[Cells, None] = dict.fromkeys((t, None) for t in tilings(layout, profile.wide))
        if not finding:
            patterns = profile.candidates(level, call.layer)[0][1:]
            cells |= dict.fromkeys(cells_of(pattern) for pattern in patterns)
        for item in items_of(call, layout):

            def one(head: int, item: Item = item) -> None:
                sums = sums_of(item.sampled(head, rows, behind), cells, layout)
                if not torch.isfinite(next(iter(sums.values())).out).all():
                    raise ValueError(
                        f"{call.layer} head {head} at sigma {sigma:.3f} gives NaN or Inf: "
                        "the stock pipeline is broken at this size or dtype"
                    )
                record(level, call.layer, head, sums)

            each_head(one, item.q.shape[1])

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

    def _find(self, level: int, layer: str, head: int, sums: dict[Cells, CellSums]) -> None:
        profile, layout = self.profile, self.profile.known_layout
        if (level, layer) not in profile.found:
            fresh = empty_heads(layout, (tile for tile, _ in sums), profile.num_heads)
            profile.found.setdefault((level, layer), fresh)  # heads come side by side
        statistics: HeadStatistics = profile.found[level, layer][head]
        for (tile, _), part in sums.items():
            discover(statistics[tile], part, layout, tile)
        look(profile, HALF, level, layer, head, next(iter(sums.values())))

    def _score(self, level: int, layer: str, head: int, sums: dict[Cells, CellSums]) -> None:
        profile, heads = self.profile, self.profile.num_heads
        candidates = profile.candidates(level, layer)[head]
        error, square, recall, norm = score(sums, candidates, profile.known_layout)
        if (level, layer) not in profile.scores:
            shape = (heads, len(candidates))
            fresh = {
                **{key: torch.zeros(shape) for key in ("error", "error_squared", "recall")},
                **{key: torch.zeros(heads) for key in ("norm", "rows")},
            }
            profile.scores.setdefault((level, layer), fresh)
        scores = profile.scores[level, layer]
        rows = len(next(iter(sums.values())).out)
        for key, value in (
            ("error", error),
            ("error_squared", square),
            ("recall", recall),
            ("norm", norm),
            ("rows", rows),
        ):
            scores[key][head] += value
        look(profile, LATER, level, layer, head, next(iter(sums.values())))
        if level == len(profile.sigmas) // 2:
            for (tile, pool), part in sums.items():
                if pool is None:
                    self._picture(layer, tile, head, heads, part)

    def _picture(self, layer: str, tile: Tile, head: int, heads: int, sums: CellSums) -> None:
        """Attention of the sampled rows over tiles, both in tile order, at most 96 x 96."""
        image = sums.mass[sums.cell.argsort(stable=True)]
        size = (min(PICTURE, image.shape[0]), min(PICTURE, image.shape[1]))
        image = torch.nn.functional.adaptive_avg_pool2d(image[None], size)[0]
        pictures = self.profile.pictures
        if (layer, tile) not in pictures:
            pictures.setdefault((layer, tile), torch.zeros(heads, *size))
        if image.shape == pictures[layer, tile].shape[1:]:
            pictures[layer, tile][head] = image
