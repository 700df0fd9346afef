"""Errors of the baselines' patterns on sampled rows of a calibration prompt, for every head."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...call import AttentionCall
from ...generation import Case, GenerationSettings
from ...integrations import attached, components, workload
from ...patterns import Pattern
from ...search.candidates import tilings
from ...search.profile import ComponentProfile
from ...search.projection import projections
from ...search.scorer import Asked, PatternScorer
from ...search.seen import density
from .families import families, row_wise_blocks, vertical_stripes

Unit = tuple[int, str, int]


@dataclass(frozen=True, eq=False)
class BaselineScores:
    """What the baselines' patterns cost and spoil; S noise levels, L layers, H heads, K patterns.

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


def score_baselines(
    pipe: Any,
    component: str,
    profile: ComponentProfile,
    case: Case,
    settings: GenerationSettings,
    rows: int = 32,
) -> BaselineScores:
    """Run the stock pipeline once and measure every baseline's patterns.

    Args:
        pipe: Stock pipeline.
        component: Its transformer's name.
        profile: The profile of that transformer; its statistics say which blocks and columns matter.
        case: Calibration prompt and seed.
        settings: Size of the profile; runs as many steps as there are noise levels.
        rows: Sampled query rows for each head, layer, step.
    """
    layout = profile.known_layout
    shared = families(layout)
    places: dict[str, list[int]] = {}
    patterns = {}
    for level, layer in profile.found:
        for number in range(profile.heads[layer][0]):
            statistics = profile.statistics(level, layer, number)[tilings(layout)[0]]
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
    return BaselineScores(places, patterns, error, dens)


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
        profile: The profile of that transformer; it names the noise levels and layers.
        patterns: For each `(level, layer, head)` its K patterns.
        case: Prompt and seed.
        settings: Size of the profile; runs as many steps as there are noise levels.
        rows: Sampled query rows for each head, layer, step.

    Returns:
        float64 `[S, L, H, K]`, squared relative error behind the output projection.
    """
    module = components(pipe)[component]

    def ask(call: AttentionCall) -> Asked | None:
        layout, sigma = call.context.layout, call.context.sigma
        if layout is None or sigma is None or call.layer not in profile.layers:
            return None
        if layout.without_global() != profile.known_layout.without_global():
            return None
        level = profile.nearest_level(sigma)
        heads = range(profile.num_heads)
        return (level, call.layer), [patterns[level, call.layer, head] for head in heads]

    scorer = PatternScorer(ask, projections(module), rows, case.seed)
    with attached(pipe, {component: scorer}):
        workload(pipe, settings).with_steps(len(profile.sigmas)).run(case)
    shape = (profile.num_heads, len(next(iter(patterns.values()))))
    none = torch.zeros(shape, dtype=torch.float64)
    found = {key: scored.squared_error for key, scored in scorer.found.items()}
    levels = [
        torch.stack([found.get((level, layer), none) for layer in profile.layers])
        for level in range(len(profile.sigmas))
    ]
    return torch.stack(levels)


def _numbered(every: Mapping[str, list[Pattern]]) -> dict[str, list[int]]:
    """For each family the numbers of its patterns, as all families follow one another."""
    numbers = itertools.count()
    return {name: list(itertools.islice(numbers, len(found))) for name, found in every.items()}
