"""Tokens in the order of each head's pattern and back, and pooled keys: for backends whose kernels read
blocks of neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..index import PatternIndex, SparseIndex, last_tokens


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
        last: int64 `[B, H, C]`: largest valid token, -1 where there is none.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
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


def pool_far_field(k: Tensor, v: Tensor, index: SparseIndex, kv_len: Tensor | None) -> Pooled:
    """Pooled keys and values of all heads.

    Args:
        k, v: `[B, H, M, D]`, tokens in place, one key head for each query head.
        index: At least one entry has a far field.
        kv_len: As in `sparse_attention`.
    """
    batch, heads, num_keys, dim = k.shape
    cells = max_cells(index)
    wide = torch.promote_types(k.dtype, torch.float32)
    tokens = torch.arange(num_keys, device=k.device)
    lengths = tokens.new_full((batch,), num_keys) if kv_len is None else kv_len.to(tokens)
    sums = torch.zeros(2, batch, heads, cells, dim, dtype=wide, device=k.device)
    counts = torch.zeros(batch, heads, cells, dtype=torch.float32, device=k.device)
    last = torch.full((batch, heads, cells), -1, dtype=torch.int64, device=k.device)
    for entry, of_entry in zip(index.entries, index.heads_of, strict=True):
        if entry.far is None or not of_entry:
            continue
        owner, members = _members(entry)
        valid = members < lengths[:, None]  # [B, keys in cells]
        size = len(entry.far.cell_offsets) - 1
        count = counts.new_zeros(batch, size).index_add_(1, owner, valid.float())
        ends = torch.stack([_last(entry, int(n)) for n in lengths.tolist()])
        for head in of_entry:
            counts[:, head, :size] = count
            last[:, head, :size] = ends
            for total, x in zip(sums, (k, v), strict=True):
                rows = x[:, head, members].to(wide).masked_fill(~valid[..., None], 0.0)
                total[:, head, :size].index_add_(1, owner, rows)
    means = (sums / counts.clamp_min(1)[..., None]).to(k.dtype)
    return Pooled(means[0], means[1], counts.log(), last)


def without_padding(x: Tensor, kv_len: Tensor | None) -> Tensor:
    """Keys or values `[B, H, M, D]` with 0 where padding is: NaN times a weight of 0 is NaN."""
    if kv_len is None:
        return x
    padding = torch.arange(x.shape[2], device=x.device) >= kv_len.to(x.device)[:, None]
    return x.masked_fill(padding[:, None, :, None], 0.0)


def max_cells(index: SparseIndex) -> int:
    """The largest number of cells of the entries, 0 if none has a far field."""
    return max(0 if e.far is None else len(e.far.cell_offsets) - 1 for e in index.entries)


def _members(entry: PatternIndex) -> tuple[Tensor, Tensor]:
    """For every key in a cell: the cell, and the token."""
    far = entry.far
    assert far is not None, "only entries with a far field have cells"
    if "cell members" not in entry.cache:
        sizes = far.cell_offsets.diff().long()
        owner = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
        first, end = int(far.cell_offsets[0]), int(far.cell_offsets[-1])
        entry.cache["cell members"] = (owner, entry.key_tokens[first:end])
    return entry.cache["cell members"]


def _last(entry: PatternIndex, kv_len: int) -> Tensor:
    key = ("last tokens", kv_len)
    if key not in entry.cache:
        here = entry.to("cpu")
        assert here.far is not None, "only entries with a far field have cells"
        found = last_tokens(here.far, here.key_tokens, kv_len)
        entry.cache[key] = found.to(entry.q_offsets.device)
    return entry.cache[key]
