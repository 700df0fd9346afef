"""Errors of the rivals' patterns on sampled rows of a calibration prompt, for every head."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...generation import Case, GenerationSettings
from ...integrations.call import AttentionCall
from ...integrations.diffusers import components
from ...layout import TokenLayout
from ...patterns import Pattern
from ..candidates import DENSE, tilings
from ..cells import cell_table, sample_rows
from ..profile import ComponentProfile
from ..projection import projections
from ..sampling import one_thread, sampled_heads, whole_layout
from ..statistics import density, score
from ..verify import dense_reference
from .families import families, row_wise_blocks, vertical_stripes

Unit = tuple[int, str, int]


@dataclass(frozen=True, eq=False)
class RivalScores:
    """What the rivals' patterns cost and spoil; S noise levels, L layers, H heads, K patterns.

    Args:
        places: For each family the numbers of its patterns.
        patterns: For `(level, layer, head)` its K patterns; those of most families are the same for all.
        error: float64 `[S, L, H, K]`, squared relative error behind the output projection.
        density: float64 `[S, L, H, K]`.
    """

    places: dict[str, list[int]]
    patterns: dict[Unit, list[Pattern]]
    error: Tensor
    density: Tensor


class _Scorer:
    """An intercept that adds up the squared errors of given patterns."""

    def __init__(
        self,
        profile: ComponentProfile,
        patterns: Mapping[Unit, list[Pattern]],
        behind: Mapping[str, Tensor],
        rows: int,
        seed: int,
    ) -> None:
        self.profile, self.patterns, self.behind, self.rows = profile, patterns, behind, rows
        self.generator = torch.Generator().manual_seed(seed)
        self.tiles = {p.tile for listed in patterns.values() for p in listed}
        count = len(next(iter(patterns.values())))
        shape = (len(profile.sigmas), len(profile.layers), profile.num_heads)
        self.error = torch.zeros(*shape, count, dtype=torch.float64)
        self.norm = torch.zeros(shape, dtype=torch.float64)

    def __call__(self, call: AttentionCall) -> Tensor:
        layout, sigma = whole_layout(call), call.context.sigma
        grid = self.profile.known_layout.without_text()
        known = layout is not None and layout.without_text() == grid
        if layout is not None and sigma is not None and known and call.layer in self.profile.layers:
            with one_thread():
                self._add(call, layout, self.profile.nearest_level(sigma))
        return call.stock()

    def _add(self, call: AttentionCall, layout: TokenLayout, level: int) -> None:
        """`score` needs the grid alone, so all texts share what it keeps."""
        grid, place = self.profile.known_layout, self.profile.layers.index(call.layer)
        rows = sample_rows(layout, self.rows, self.generator)
        for head, sampled in sampled_heads(call, layout, rows, self.behind.get(call.layer)):
            patterns = self.patterns[level, call.layer, head]
            sums = {t: sampled.by_cells(cell_table(layout, t)) for t in self.tiles}
            error, _, _, norm = score(sums, (DENSE, *patterns), grid)
            self.error[level, place, head] += error[1:]
            self.norm[level, place, head] += norm


def score_rivals(
    pipe: Any,
    component: str,
    profile: ComponentProfile,
    case: Case,
    settings: GenerationSettings,
    rows: int = 32,
) -> RivalScores:
    """Run the stock pipeline once and measure every rival's patterns.

    Args:
        pipe: Stock pipeline.
        component: Its transformer's name.
        profile: Of it; its statistics say which blocks and columns matter.
        case: Calibration prompt and seed.
        settings: Size of the profile; runs as many steps as there are noise levels.
        rows: Sampled query rows for each head, layer, step.
    """
    layout = profile.known_layout
    shared = families(layout)
    places: dict[str, list[int]] = {}
    patterns = {}
    for (level, layer), heads in profile.found.items():
        for number, head in enumerate(heads):
            statistics = head[tilings(layout)[0]]
            every = {**shared, "vertical": vertical_stripes(statistics["column"], layout)}
            if "block" in statistics:
                every["blocks"] = row_wise_blocks(statistics["block"], layout)
            patterns[level, layer, number] = [p for family in every.values() for p in family]
            places = places or _numbered(every)
    error = score_patterns(pipe, component, profile, patterns, case, settings, rows)
    dens = torch.zeros_like(error)
    for (level, layer, head), listed in patterns.items():
        dens[level, profile.layers.index(layer), head] = torch.tensor(
            [density(p, layout) for p in listed], dtype=torch.float64
        )
    return RivalScores(places, patterns, error, dens)


def _numbered(every: Mapping[str, list[Pattern]]) -> dict[str, list[int]]:
    """For each family the numbers of its patterns, as all families follow one another."""
    numbers = itertools.count()
    return {name: list(itertools.islice(numbers, len(found))) for name, found in every.items()}


def score_patterns(
    pipe: Any,
    component: str,
    profile: ComponentProfile,
    patterns: Mapping[Unit, list[Pattern]],
    case: Case,
    settings: GenerationSettings,
    rows: int,
) -> Tensor:
    """Run the stock pipeline once and measure given patterns on the same sampled rows.

    Args:
        pipe: Stock pipeline.
        component: Its transformer's name.
        profile: Of it.
        patterns: For each `(level, layer, head)` equally many, none of them dense.
        case: Prompt and seed.
        settings: Size of the profile; runs as many steps as there are noise levels.
        rows: Sampled query rows for each head, layer, step.

    Returns:
        float64 `[S, L, H, K]`, squared relative error behind the output projection.
    """
    behind = projections(components(pipe)[component], profile.num_heads)
    scorer = _Scorer(profile, patterns, behind, rows, case.seed)
    steps = replace(settings, steps=len(profile.sigmas))
    dense_reference(pipe, case, steps, {component: scorer})
    return scorer.error / scorer.norm[..., None].clamp_min(1e-20)
