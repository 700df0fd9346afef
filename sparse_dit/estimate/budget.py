"""Which columns and diagonal bins are chosen: those with the most probability for what they cost.

Letters in shapes: L heads, M keys, C bins of 64 offsets. A choice is bool `[L, M + C]`, columns first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.cpu import estimates, library
from ..patterns.estimated import Budget, Share
from .rows import BIN, CallRows

BIN_KEYS = 80  # a bin costs a group of 64 rows 128 keys, 64 of them beside another bin


def local_bins(local: int) -> int:
    """How many bins hold the keys at most about `local` back; a row's own is in the first."""
    return max(1, -(-local // BIN))


def choose(
    columns: Tensor,
    diagonals: Tensor,
    call: CallRows,
    budget: Budget | Share,
    *,
    sinks: int,
    local: int,
    keys: Tensor | None = None,
) -> Tensor:
    """Columns and bins of each head within a budget, or with a share of the probability.

    Args:
        columns, diagonals: float32 `[L, M]` and `[L, C]`: probability per row that sees the column or bin,
            so that the gain and the cost of a column are both in proportion to the rows that see it; of
            columns without the bins that are chosen anyway.
        call: All rows.
        budget: How much is chosen.
        sinks, local: Keys that are always chosen: the first, and those behind each row.
        keys: Bool `[M]`: columns that may be chosen, whose number is the budget's length; None for all.
    """
    length = call.num_keys if keys is None else int(keys.sum())
    allowed = call.budget(budget.keys(length))
    scores, costs, forced = candidates(columns, diagonals, call, sinks=sinks, local=local)
    if keys is not None:
        hidden = torch.nn.functional.pad(~keys, (0, diagonals.shape[1])) & ~forced
        scores, costs = scores.masked_fill(hidden, -1), costs.masked_fill(hidden, allowed + 1)
        columns = columns.masked_fill(~keys, 0)
    chosen = within(scores, costs, forced, allowed)
    if isinstance(budget, Share):
        bins = local_bins(local)
        seen, pairs = call.column_rows(bins * BIN).sum(0), call.diagonal_pairs.sum(0)
        chosen |= torch.cat(
            [
                fewest(columns, columns * seen, budget.gamma),
                fewest(diagonals, diagonals * pairs, budget.gamma),
            ],
            1,
        )
    return chosen


def candidates(
    columns: Tensor, diagonals: Tensor, call: CallRows, *, sinks: int, local: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores `[L, M + C]`, costs and whether it is chosen anyway, `[M + C]`, of columns, then bins.

    The arguments are those of `choose`. A score times a cost is the probability that is gained.
    """
    bins = local_bins(local)
    seen, pairs = call.column_rows(bins * BIN).sum(0), call.diagonal_pairs.sum(0)
    scores = torch.cat([columns, diagonals / BIN_KEYS], 1)
    costs = torch.cat([seen, pairs * BIN_KEYS // BIN])
    forced = torch.cat([call.sinks(sinks), torch.arange(len(pairs)) < bins])
    return scores, costs, forced


def within(scores: Tensor, costs: Tensor, forced: Tensor, budget: int) -> Tensor:
    """The best candidates, in the order of scores, as long as the sum of their costs is within the budget.

    Args:
        scores: float32 `[L, K]`, no NaN; of equal ones the first is better.
        costs: int64 `[K]`.
        forced: Bool `[K]`: chosen before all others, at any cost.
        budget: The largest sum of costs.
    """
    if library.LIBRARY is not None:
        return estimates.choose(scores, costs, forced, budget)
    return within_by_torch(scores, costs, forced, budget)


def within_by_torch(scores: Tensor, costs: Tensor, forced: Tensor, budget: int) -> Tensor:
    """`within` by PyTorch, where the kernel's library is missing."""
    order = scores.masked_fill(forced, torch.inf).argsort(dim=1, descending=True, stable=True)
    taken = costs[order].cumsum(1) <= budget
    return torch.zeros_like(taken).scatter_(1, order, taken) | forced


def fewest(scores: Tensor, mass: Tensor, gamma: float) -> Tensor:
    """The fewest candidates, in the order of scores, with a share `gamma` of all mass; bool, as `scores`."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    before = mass.double().gather(-1, order).cumsum(-1).roll(1, -1)
    total = before[..., :1].clone()
    before[..., 0] = 0
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, before < gamma * total)
