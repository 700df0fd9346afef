"""Heads whose important tiles depend on the prompt: a plan that is made once suits them less.

How far a head does is measured as a regret. The tiles are chosen on the prompts of some profiling runs
(those that find candidates), and on the prompts of others (those that score). The regret is the share of the
saved error that the first choice loses against the second one on the second prompts, and the other way round.
Two halves of one run's sampled rows differ by chance too: the regret between them is subtracted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..patterns import Pattern, Vertical
from .candidates import chosen_offsets, tilings
from .cells import CellSums, CellTable, cell_table
from .placed import best_columns
from .profile import HALF, LATER, ComponentProfile
from .seen import by_offset
from .statistics import add_heads, compared_shapes, of_head, of_heads

BUDGET = 0.2  # share of the pairs, or of the columns, that is chosen
MARKED = 0.1  # from this regret on a head counts as depending on the prompt


def add_rows(
    profile: ComponentProfile, kind: str, level: int, layer: str, heads: range, sums: CellSums
) -> None:
    """Add the sampled rows of h heads to the sums by which their attention is compared between prompts.

    Args:
        profile: The profile that is added to.
        kind: `HALF` for a finding run, of which every other row counts; `LATER` for a scoring run, of which
            all rows do.
        level, layer, heads: The noise level, layer and heads that the rows are of.
        sums: The sums of the rows by cells in the first token order of `tilings`.
    """
    layout, key = profile.known_layout, (kind, level, layer)
    tile = tilings(layout)[0]
    if key not in profile.looks:
        fresh = of_heads(compared_shapes(layout), profile.heads[layer][0])
        profile.looks.setdefault(key, fresh)  # other heads, on other threads, come to it too
    rows = slice(None, None, 2) if kind == HALF else slice(None)
    saved, cell = sums.benefit(far=True)[:, rows], sums.cell[rows]
    offsets = by_offset(saved, cell, layout, tile)
    added = {"offset_far": offsets, "column": saved.sum(1).cpu()}
    add_heads(profile.looks[key], heads, added, cell, layout, tile)


def prompt_dependence(profile: ComponentProfile) -> dict[tuple[int, str], Tensor]:
    """For each `(level, layer)` the regret of each head, float32 `[H, 2]`: of offsets, and of columns.

    The regret is the share of the error that a prompt's own choice saves, and the choice made on another
    prompt doesn't, less what two halves of the rows of one run differ by: 0 (the same choice serves all)
    to 1. Levels that no scoring run came near are left out.

    Args:
        profile: A profile whose finding and scoring runs are done.
    """
    layout = profile.known_layout
    tile = tilings(layout)[0]
    table = cell_table(layout, tile)
    result = {}
    for (level, layer), found in profile.found.items():
        if (LATER, level, layer) not in profile.looks:
            continue
        half, later = (profile.looks[kind, level, layer] for kind in (HALF, LATER))
        rows = []
        for head in range(profile.heads[layer][0]):
            every = of_head(found[tile], head)
            first, other = of_head(half, head), of_head(later, head)
            one = {name: every[name] for name in half}
            rest = {name: one[name] - first[name] for name in one}
            rows.append(_regret([one, other], table) - _regret([first, rest], table))
        result[level, layer] = torch.stack(rows).clamp_min(0)
    return result


def depends(regret: Tensor, pattern: Pattern) -> bool:
    """Whether a head's pattern keeps tiles or columns that depend on the prompt.

    Args:
        regret: The head's regrets in `[0, 1]`, `[2]`: of offsets, and of columns.
        pattern: The pattern that was chosen for the head.
    """
    if pattern.is_dense:
        return False
    columns = [isinstance(shape, Vertical) for shape in pattern.shapes]
    of = ([0] if not all(columns) else []) + ([1] if any(columns) else [])
    return bool(regret[of].max() > MARKED)


def _regret(statistics: Sequence[dict[str, Tensor]], table: CellTable) -> Tensor:
    """Regrets of offsets and of columns, float32 `[2]`: the mean over ordered pairs of `statistics`."""
    result = []
    for name, choose in (("offset_far", _offsets), ("column", _columns)):
        chosen = [choose(s, table) for s in statistics]
        pairs = itertools.permutations(range(len(statistics)), 2)
        regrets = []
        for mine, other in pairs:
            own, foreign = (
                statistics[mine][name][chosen[n]].sum().item() for n in (mine, other)
            )  # what is saved here with this choice, and with the other's
            regrets.append(max(0.0, 1 - foreign / own) if own > 0 else 0.0)
        result.append(sum(regrets) / len(regrets))
    return torch.tensor(result, dtype=torch.float32)


def _offsets(statistics: dict[str, Tensor], table: CellTable) -> Tensor:
    """The offsets that a search would choose, a bool lattice of relative tiles."""
    places = chosen_offsets(statistics, "offset_far", BUDGET, table) + table.counts - 1
    member = torch.zeros_like(statistics["offset_far"], dtype=torch.bool)
    member[tuple(places.T)] = True
    return member


def _columns(statistics: dict[str, Tensor], table: CellTable) -> Tensor:
    """The columns that a search would choose, bool `[C]`."""
    member = torch.zeros(len(table.tokens), dtype=torch.bool)
    member[list(best_columns(statistics["column"], BUDGET))] = True
    return member
