"""What the cells of a far field hold of the keys that a call may see at all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .entry import PatternIndex


def cell_members(entry: PatternIndex) -> tuple[Tensor, Tensor]:
    """For every key in a cell of the far field: the cell, and the token; made once."""
    far = entry.far
    assert far is not None, "only entries with a far field have cells"
    found = entry.cache.get("cell members")
    if not isinstance(found, tuple):
        sizes = far.cell_offsets.diff().long()
        owner = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
        first, end = int(far.cell_offsets[0]), int(far.cell_offsets[-1])
        found = entry.cache["cell members"] = (owner, entry.key_tokens[first:end])
    return found


class Cells(NamedTuple):
    """What holds of the valid tokens of each cell, int64 `[..., C]`.

    Args:
        first, last: The smallest and the largest token; M and -1 where there is none.
        size: How many there are.
    """

    first: Tensor
    last: Tensor
    size: Tensor


def valid_cells(entry: PatternIndex, valid: Tensor) -> Cells:
    """What cells hold of valid tokens.

    Args:
        entry: It has a far field.
        valid: int64 `[..., 2]` on the entry's device: the first valid token, and the last + 1.
    """
    assert entry.far is not None, "only entries with a far field have cells"
    owner, tokens = cell_members(entry)
    ok = (tokens >= valid[..., :1]) & (tokens < valid[..., 1:])
    owner = owner.expand(ok.shape)
    none = tokens.new_zeros(*ok.shape[:-1], len(entry.far.cell_offsets) - 1)
    first = torch.where(ok, tokens, entry.num_keys)
    last = torch.where(ok, tokens, -1)
    return Cells(
        (none + entry.num_keys).scatter_reduce_(-1, owner, first, "amin"),
        (none - 1).scatter_reduce_(-1, owner, last, "amax"),
        none.scatter_add_(-1, owner, ok.long()),
    )
