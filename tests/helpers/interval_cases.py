"""The masks that hosts make, as intervals of keys a row, and an index to try them on."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_dit.index import SparseIndex
from tests.helpers.kernel_cases import dense, entry, split

QUERIES, KEYS = 90, 110  # a chunk of a prefill behind cached keys


def masks(n: int = QUERIES, m: int = KEYS) -> dict[str, Tensor]:
    """Masks by their definition, bool `[2, N, M]`."""
    row, key = torch.arange(n)[:, None] + m - n, torch.arange(m)
    causal = key <= row
    sequence = torch.tensor([[0, 40, 41, 75], [0, 30, 60, 104]])  # where packed ones start
    of_row = torch.stack([torch.searchsorted(x, row, right=True) for x in sequence])
    of_key = torch.stack([torch.searchsorted(x, key, right=True) for x in sequence])
    same = of_row == of_key[:, None]
    begun = key >= torch.tensor([0, 37])[:, None, None]
    lengths = torch.tensor([m, 71])[:, None, None]
    prefix = key < torch.tensor([25, 64])[:, None, None]
    kinds = {
        "causal": causal,
        "left padding": causal & begun,
        "right padding": causal & (key < lengths),
        "padding alone": key < lengths.expand(-1, n, 1),
        "packed": same & causal,
        "packed, both ways": same,
        "window": causal & (key > row - 33),
        "window of both sides": (key - row).abs() < 20,
        "window behind padding": causal & (key > row - 33) & begun,
        "prefix": causal | prefix,
        "blocks in order": key // 16 <= row // 16,
        "rows without keys": causal & (row % 3 > 0),
        "nothing": causal & (key < torch.tensor([m, 0])[:, None, None]),
    }
    return {name: mask.expand(2, n, m) for name, mask in kinds.items()}


def bounds(mask: Tensor) -> dict[str, Tensor]:
    """`row_start` and `row_stop` of a mask `[B, N, M]`; they don't ascend where a row has no key."""
    start = mask.int().argmax(-1)
    some = mask.any(-1)
    return {
        "row_start": torch.where(some, start, 9).int(),
        "row_stop": torch.where(some, start + mask.sum(-1), 5).int(),
    }


def every_entry(n: int = QUERIES, m: int = KEYS, group: int = 16) -> SparseIndex:
    """Dense, columns, keys in another order, and cells in place and in another order."""
    generator = torch.Generator().manual_seed(0)
    q_order, k_order = (torch.randperm(size, generator=generator) for size in (n, m))
    groups = split(n, group)
    keys = [range(group % 3, m, 2 + group % 2) for group in range(len(groups))]
    cells = [7, 8, 20, 20, 45, 61, 62, 90, m]
    far = {"cells": cells, "pooled": [range(group % 3, 8) for group in range(len(groups))]}
    near = [range(7) for _ in groups]
    entries = (
        dense(n, m),
        entry(m, groups, keys),
        entry(m, groups, keys, q_order=q_order, k_order=k_order),
        entry(m, groups, near, **far),
        entry(m, groups, near, q_order=q_order, k_order=k_order, **far),
    )
    return SparseIndex(entries, (0, 1, 2, 3, 4, 0))
