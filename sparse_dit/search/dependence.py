"""Heads whose best places depend on the prompt: a plan made once suits them less.

Found from what single prompts gave, without any generation: the tiles that one prompt's statistics choose
are judged by another's, beside those that the other would have chosen itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import Tile
from .candidates import best_columns, chosen_offsets
from .cells import CellTable, cell_table
from .profile import ComponentProfile


def prompt_dependence(
    profiles: Sequence[ComponentProfile], tile: Tile, budget: float = 0.2
) -> dict[tuple[int, str], Tensor]:
    """For each `(level, layer)` the regret of each head, float32 `[H, 2]`: of offsets, and of columns.

    The regret is the share of the error that a prompt's own choice saves, and the choice made on another
    prompt doesn't; mean over ordered pairs of prompts, 0 (the same choice serves all) to 1. Sampled rows
    alone give a regret too: compare with that of two profiles of one prompt at two seeds.

    Args:
        profiles: What was found on one prompt each, at the same size and noise levels.
        tile: Token order to look at, one of `candidates.tilings`.
        budget: Share of the pairs, or of the columns, that is chosen.

    Raises:
        ValueError: For fewer than two profiles, or profiles that aren't of the same calls.
    """
    if len(profiles) < 2:
        raise ValueError(f"comparing prompts needs two profiles or more, got {len(profiles)}")
    first = profiles[0]
    grids = {profile.known_layout.without_text() for profile in profiles}
    if len(grids) > 1 or any(p.found.keys() != first.found.keys() for p in profiles[1:]):
        raise ValueError("the profiles must be of the same size, noise levels and layers")
    table = cell_table(first.known_layout, tile)
    return {
        key: torch.stack(
            [
                _regret([profile.found[key][head][tile] for profile in profiles], table, budget)
                for head in range(first.num_heads)
            ]
        )
        for key in first.found
    }


def _regret(statistics: Sequence[dict[str, Tensor]], table: CellTable, budget: float) -> Tensor:
    """`[2]`: of offsets and of columns, mean over ordered pairs of prompts."""
    result = []
    for name, choose in (("offset_far", _offsets), ("column", _columns)):
        chosen = [choose(s, table, budget) for s in statistics]
        pairs = itertools.permutations(range(len(statistics)), 2)
        regrets = []
        for mine, other in pairs:
            own, foreign = (
                statistics[mine][name][chosen[n]].sum().item() for n in (mine, other)
            )  # what my prompt saves with my choice, and with the other's
            regrets.append(max(0.0, 1 - foreign / own) if own > 0 else 0.0)
        result.append(sum(regrets) / len(regrets))
    return torch.tensor(result)


def _offsets(statistics: dict[str, Tensor], table: CellTable, budget: float) -> Tensor:
    """bool, in the lattice of relative tiles: the stencil that a search would take."""
    places = chosen_offsets(statistics, "offset_far", budget, table) + table.counts - 1
    member = torch.zeros_like(statistics["offset_far"], dtype=torch.bool)
    member[tuple(places.T)] = True
    return member


def _columns(statistics: dict[str, Tensor], table: CellTable, budget: float) -> Tensor:
    """bool `[C]`: the columns that a search would take."""
    member = torch.zeros(len(table.tokens), dtype=torch.bool)
    member[list(best_columns(statistics["column"], budget))] = True
    return member
