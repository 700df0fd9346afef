"""Tokens in the order of each head's pattern and back, and pooled keys: for backends whose kernels read
blocks of neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cells import cell_members, valid_cells
from ..index import SparseIndex
from ..intervals import RowIntervals


@dataclass(frozen=True, eq=False)
class Orders:
    """Token at each sorted position, by head; None if all heads leave tokens in place.

    Args:
        queries: int64 `[H, N]` or None.
        keys: int64 `[H, M]` or None.
    """

    queries: Tensor | None
    keys: Tensor | None


@dataclass(frozen=True, eq=False)
class Pooled:
    """Far field of a call; heads with fewer cells than the largest number C are filled up.

    Args:
        keys, values: `[B, H, C, D]`, means of the valid tokens of each cell.
        bias: float32 `[B, H, C]`: log of the number of valid tokens, -inf where there are none.
        first, last: int64 `[B, H, C]`: smallest and largest valid token, M and -1 where there is none.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    first: Tensor
    last: Tensor


def orders_of(index: SparseIndex) -> Orders:
    """Orders of an index, kept in its cache."""
    if "orders" not in index.cache:
        tables = []
        for name in ("query", "key"):
            entries = index.entries
            stay = all(getattr(entry, f"{name[0]}_order") is None for entry in entries)
            tokens = [getattr(entry, f"{name}_tokens") for entry in entries]
            tables.append(None if stay else torch.stack([tokens[p] for p in index.head_to_pattern]))
        index.cache["orders"] = Orders(*tables)
    return index.cache["orders"]


def sort_tokens(x: Tensor, order: Tensor | None) -> Tensor:
    """`[B, H, N, D]` with the tokens of each head in its order."""
    return x if order is None else x.take_along_dim(order[None, :, :, None], 2)


def unsort_tokens(x: Tensor, order: Tensor | None) -> Tensor:
    """The inverse, for `[B, H, N, D]` and for `[B, H, N]`."""
    if order is None:
        return x
    places = order[None] if x.ndim == 3 else order[None, :, :, None]
    return torch.empty_like(x).scatter_(2, places.expand_as(x), x)


def pool_far_field(k: Tensor, v: Tensor, index: SparseIndex, valid: Tensor | None) -> Pooled:
    """Pooled keys and values of all heads.

    Args:
        k, v: `[B, H, M, D]`, tokens in place, one key head for each query head; 0 where keys aren't valid.
        index: At least one entry has a far field.
        valid: The valid keys, int64 `[1 or B, 2]`; None for all.
    """
    batch, heads, num_keys, dim = k.shape
    cells = max_cells(index)
    wide = torch.promote_types(k.dtype, torch.float32)
    if valid is None:
        valid = torch.tensor([[0, num_keys]], device=k.device)
    sums = torch.zeros(2, batch, heads, cells, dim, dtype=wide, device=k.device)
    counts = torch.zeros(batch, heads, cells, dtype=torch.float32, device=k.device)
    first = torch.full((batch, heads, cells), num_keys, dtype=torch.int64, device=k.device)
    last = torch.full_like(first, -1)
    for entry, of_entry in zip(index.entries, index.heads_of, strict=True):
        if entry.far is None or not of_entry:
            continue
        owner, members = cell_members(entry)
        found = valid_cells(entry, valid)
        size = len(entry.far.cell_offsets) - 1
        for head in of_entry:
            counts[:, head, :size] = found.size.float()
            first[:, head, :size], last[:, head, :size] = found.first, found.last
            for total, x in zip(sums, (k, v), strict=True):
                total[:, head, :size].index_add_(1, owner, x[:, head, members].to(wide))
    means = (sums / counts.clamp_min(1)[..., None]).to(k.dtype)
    return Pooled(means[0], means[1], counts.log(), first, last)


def without_padding(x: Tensor, rows: RowIntervals | None, num_queries: int) -> Tensor:
    """Keys or values `[B, H, M, D]` with 0 where no row sees them: NaN times a weight of 0 is NaN."""
    if rows is None:
        return x
    first, stop = rows.valid(x.shape[2], num_queries)[..., None].unbind(1)
    tokens = torch.arange(x.shape[2], device=x.device)
    return x.masked_fill(((tokens < first) | (tokens >= stop))[:, None, :, None], 0.0)


def max_cells(index: SparseIndex) -> int:
    """The largest number of cells of the entries, 0 if none has a far field."""
    return max(0 if e.far is None else len(e.far.cell_offsets) - 1 for e in index.entries)
