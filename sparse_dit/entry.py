"""What one pattern computes at one size: an entry of a `SparseIndex`.

Letters in shapes: H heads, N query tokens, M key tokens, G query groups, R key runs, C cells.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FarField:
    """Pooled keys that stand for what a group doesn't see exactly.

    A cell of n keys is one key: the mean of its keys, with log(n) added to its logit, and the mean of
    its values. Sources of the idea: Multipole Attention (arXiv 2506.13059), PISA (2602.01077), SVG-EAR
    (2603.08982), Pyramid Sparse Attention (2512.04025).

    Args:
        cell_offsets: int32 `[C + 1]`, sorted key positions where cells start, and where the last ends.
            Global keys, outside of all cells, have no pooled form.
        run_offsets: int32 `[G + 1]` into `runs`.
        runs: int32 `[F, 2]`: first cell and number of cells that a group sees pooled; ascending and
            disjoint, and disjoint from what the group sees exactly.
    """

    cell_offsets: Tensor
    run_offsets: Tensor
    runs: Tensor


@dataclass(frozen=True, eq=False)
class PatternIndex:
    """What one pattern computes at one size. Tensors are int32 and shared by all heads that use it.

    Args:
        num_queries, num_keys: N and M.
        q_order, k_order: `[N]`, `[M]`: the token at each sorted position; None if tokens stay in place.
        q_offsets: `[G + 1]`: groups are the sorted query rows between two offsets, 1 to 128 of them
            (a dense pattern: one group of all rows).
        run_offsets: `[G + 1]` into `runs`.
        runs: `[R, 2]`: start and length, in sorted key positions, of the keys that every row of the
            group sees exactly; ascending, disjoint and not touching.
        far: Pooled keys, or None.
    """

    num_queries: int
    num_keys: int
    q_order: Tensor | None
    k_order: Tensor | None
    q_offsets: Tensor
    run_offsets: Tensor
    runs: Tensor
    far: FarField | None = None
    cache: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.q_offsets) - 1

    @functools.cached_property
    def query_tokens(self) -> Tensor:
        """int64 `[N]`: `q_order`, written out where tokens stay in place."""
        return _written_out(self.q_order, self.num_queries, self.q_offsets.device)

    @functools.cached_property
    def key_tokens(self) -> Tensor:
        """int64 `[M]`: `k_order`, written out where tokens stay in place."""
        return _written_out(self.k_order, self.num_keys, self.q_offsets.device)

    @functools.cached_property
    def is_dense(self) -> bool:
        """Whether every query sees every key exactly."""
        lengths = self.group_keys
        return bool((lengths == self.num_keys).all())

    @functools.cached_property
    def is_empty(self) -> bool:
        """Whether no query sees anything (a skipped head)."""
        return len(self.runs) == 0 and (self.far is None or len(self.far.runs) == 0)

    @functools.cached_property
    def group_keys(self) -> Tensor:
        """int64 `[G]`: keys that each group sees exactly."""
        return _per_group(self.run_offsets, self.runs[:, 1])

    @functools.cached_property
    def group_cells(self) -> Tensor:
        """int64 `[G]`: cells that each group sees pooled."""
        if self.far is None:
            return torch.zeros_like(self.group_keys)
        return _per_group(self.far.run_offsets, self.far.runs[:, 1])

    @functools.cached_property
    def density(self) -> float:
        """Computed pairs (exact and pooled) over all pairs; a pooled key counts as one."""
        rows = self.q_offsets.diff().to(torch.int64)
        pairs = (rows * (self.group_keys + self.group_cells)).sum().item()
        return pairs / (self.num_queries * self.num_keys)

    def placed(self, places: Tensor) -> PatternIndex:
        """The same of a sequence whose tokens have been moved: token `t` lies at `places[t]`, int64 `[N]`.

        Raises:
            ValueError: If queries and keys aren't the tokens of one sequence, in one order.
        """
        if self.q_order is not self.k_order or self.num_queries != self.num_keys:
            raise ValueError("queries and keys must have one order, got two; move each by itself")
        order = places[self.query_tokens].int()
        stays = bool((order == torch.arange(len(order), device=order.device)).all())
        order = None if stays else order
        return replace(self, q_order=order, k_order=order, cache={})

    def to(self, device: torch.device | str) -> PatternIndex:
        """A copy with all tensors on `device` (itself if they are there)."""
        if self.q_offsets.device == torch.device(device):
            return self
        moved = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name in self.__dataclass_fields__
        }
        far = self.far and replace(self.far, **{k: v.to(device) for k, v in vars(self.far).items()})
        return replace(self, **moved, far=far, cache={})


def _written_out(order: Tensor | None, n: int, device: torch.device) -> Tensor:
    return torch.arange(n, device=device) if order is None else order.long()


def _per_group(offsets: Tensor, lengths: Tensor) -> Tensor:
    total = torch.nn.functional.pad(lengths.to(torch.int64).cumsum(0), (1, 0))
    return total[offsets[1:].long()] - total[offsets[:-1].long()]


def expand(runs: Tensor) -> Tensor:
    """int64 positions in runs `[R, 2]` (start, length), in order."""
    starts, lengths = runs[:, 0].long(), runs[:, 1].long()
    ends = lengths.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    shift = torch.repeat_interleave(starts - (ends - lengths), lengths)
    return torch.arange(total, device=runs.device) + shift
