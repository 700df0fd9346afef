"""Errors of the rivals' patterns on sampled rows of a calibration prompt, for every head."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...generation import Case, GenerationSettings, generate
from ...integrations.call import AttentionCall
from ...integrations.diffusers import attach, components
from ...layout import TokenLayout
from ...patterns import Pattern
from ..candidates import tilings
from ..cells import sample_rows
from ..nested import Candidates
from ..profile import ComponentProfile
from ..projection import projections
from ..sampling import sampled_heads, whole_layout
from ..seen import density
from ..side_by_side import one_thread
from ..statistics import score_all
from .families import families, row_wise_blocks, vertical_stripes

Unit = tuple[int, str, int]


class Judge:
    """Measures given patterns on sampled rows of a call.

    Args:
        profile: Of the model; calls of other layers or sizes have no place.
        behind: For layers by name what values are multiplied by, see `projections`.
        rows: Sampled query rows for each head and call.
        seed: Of the rows.
    """

    def __init__(
        self, profile: ComponentProfile, behind: Mapping[str, Tensor], rows: int, seed: int
    ) -> None:
        self.profile, self.behind, self.rows = profile, behind, rows
        self.generator = torch.Generator().manual_seed(seed)

    def place_of(self, call: AttentionCall) -> tuple[int, int] | None:
        """Numbers of the noise level and the layer; None if the profile has no such call."""
        layout, sigma = whole_layout(call), call.context.sigma
        if layout is None or sigma is None or call.layer not in self.profile.layers:
            return None
        if layout.without_text() != self.profile.known_layout.without_text():
            return None
        return self.profile.nearest_level(sigma), self.profile.layers.index(call.layer)

    def __call__(
        self, call: AttentionCall, layout: TokenLayout, patterns: Sequence[Sequence[Pattern]]
    ) -> tuple[Tensor, Tensor]:
        """Squared errors float64 `[H, K]` and squared outputs `[H]`, summed over rows and batch.

        Args:
            call: What the host computes.
            layout: Its sequence.
            patterns: Equally many for each head, none of them dense.
        """
        error = torch.zeros(len(patterns), len(patterns[0]), dtype=torch.float64)
        norm = torch.zeros(len(patterns), dtype=torch.float64)
        rows = sample_rows(layout, self.rows, self.generator)
        for head, sampled in sampled_heads(call, layout, rows, self.behind.get(call.layer)):
            found = score_all(sampled, Candidates(patterns[head]), layout)
            error[head] += found[0]
            norm[head] += found[3]
        return error, norm


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

    def __init__(self, judge: Judge, patterns: Mapping[Unit, list[Pattern]]) -> None:
        self.judge, self.patterns = judge, patterns
        count = len(next(iter(patterns.values())))
        profile = judge.profile
        shape = (len(profile.sigmas), len(profile.layers), profile.num_heads)
        self.error = torch.zeros(*shape, count, dtype=torch.float64)
        self.norm = torch.zeros(shape, dtype=torch.float64)

    def __call__(self, call: AttentionCall) -> Tensor:
        place, layout = self.judge.place_of(call), whole_layout(call)
        if place is not None and layout is not None:
            heads = range(call.q.shape[2])
            listed = [self.patterns[place[0], call.layer, head] for head in heads]
            with one_thread():
                error, norm = self.judge(call, layout, listed)
            self.error[place] += error
            self.norm[place] += norm
        return call.stock()


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
    module = components(pipe)[component]
    behind = projections(module, profile.num_heads)
    scorer = _Scorer(Judge(profile, behind, rows, case.seed), patterns)
    attachment = attach(module, scorer)
    try:
        generate(pipe, case, replace(settings, steps=len(profile.sigmas)))
    finally:
        attachment.detach()
    return scorer.error / scorer.norm[..., None].clamp_min(1e-20)


def _numbered(every: Mapping[str, list[Pattern]]) -> dict[str, list[int]]:
    """For each family the numbers of its patterns, as all families follow one another."""
    numbers = itertools.count()
    return {name: list(itertools.islice(numbers, len(found))) for name, found in every.items()}
