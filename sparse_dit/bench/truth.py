"""Whether what is timed is right: a sample of query rows, computed in float64 from the index alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..entry import PatternIndex, expand
from ..index import SparseIndex

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
GROUPS, ROWS = 6, 16  # sampled per head


class WrongResult(RuntimeError):
    """Something that was to be timed computes the wrong thing."""


def check(name: str, got: Tensor, q: Tensor, k: Tensor, v: Tensor, index: SparseIndex) -> float:
    """Relative L2 error of sampled rows, the largest of the heads.

    Args:
        name: What computed the result, for the error's message.
        got: The output to check, `[1, H, N, D]`.
        q, k, v: The inputs it was computed from, `[1, H, N, D]`; no padding, not causal.
        index: The query-key pairs that it should have computed.

    Raises:
        WrongResult: If the error is above `TOLERANCES` of the dtype, or not finite.
    """
    worst = 0.0
    for head, place in enumerate(index.head_to_pattern):
        entry = index.entries[place]
        groups = torch.linspace(0, entry.num_groups - 1, min(GROUPS, entry.num_groups)).long()
        parts = [
            _rows(q[0, head], k[0, head], v[0, head], entry, group) for group in groups.tolist()
        ]
        rows = torch.cat([part.tokens for part in parts])
        want = torch.cat([part.out for part in parts])
        error = (got[0, head, rows].double() - want).norm() / want.norm().clamp_min(1e-30)
        worst = max(worst, error.item()) if error.isfinite() else float("inf")
    if not (worst <= TOLERANCES[q.dtype] and bool(got.isfinite().all())):
        raise WrongResult(
            f"{name} must be within {TOLERANCES[q.dtype]:g} of float64, its relative error is "
            f"{worst:.2g}; it is not timed"
        )
    return worst


def check_mass(
    name: str, mass: Tensor, q: Tensor, k: Tensor, v: Tensor, index: SparseIndex, block: int
) -> None:
    """Compare block mass with that of a few groups in float64.

    Args:
        name: What computed the result, for the error's message.
        mass: `[1, H, G, ceil(M / block)]`, what it computed.
        q, k, v, index: As for `check`; without far field.
        block: Sorted keys in a block.

    Raises:
        WrongResult: If a block is off by more than `TOLERANCES` of the group's rows.
    """
    for head, place in enumerate(index.head_to_pattern):
        entry = index.entries[place]
        for group in {0, entry.num_groups - 1}:
            rows = _rows(q[0, head], k[0, head], v[0, head], entry, group, entry.num_queries)
            want = torch.zeros(mass.shape[-1], dtype=torch.float64)
            want.index_add_(0, rows.keys // block, rows.weights.sum(0))
            off = (mass[0, head, group].double() - want).abs().max().item() / len(rows.tokens)
            if not off <= TOLERANCES[q.dtype]:
                raise WrongResult(
                    f"{name}: block mass must be within {TOLERANCES[q.dtype]:g} of float64, it is "
                    f"off by {off:.2g} of its rows; it is not timed"
                )


@dataclass(frozen=True)
class _Rows:
    """Query tokens of a group, what they weigh, and their attention.

    Args:
        tokens: int64 `[rows]`.
        keys: int64 `[K]`, sorted positions of the keys seen exactly.
        weights: float64 `[rows, K + cells]`.
        out: float64 `[rows, D]`.
    """

    tokens: Tensor
    keys: Tensor
    weights: Tensor
    out: Tensor


def _rows(
    q: Tensor, k: Tensor, v: Tensor, entry: PatternIndex, group: int, most: int = ROWS
) -> _Rows:
    """At most `most` rows of a group, spread over it."""
    start, stop = entry.q_offsets[group : group + 2].tolist()
    tokens = entry.query_tokens[start:stop]
    tokens = tokens[torch.linspace(0, len(tokens) - 1, min(most, len(tokens))).long()]
    exact = expand(entry.runs[entry.run_offsets[group] : entry.run_offsets[group + 1]])
    seen = entry.key_tokens[exact]
    keys, values, bias = [k[seen].double()], [v[seen].double()], [torch.zeros(len(seen))]
    if entry.far is not None:
        far = entry.far
        cells = expand(far.runs[far.run_offsets[group] : far.run_offsets[group + 1]])
        for cell in cells.tolist():
            first, last = far.cell_offsets[cell : cell + 2].tolist()
            members = entry.key_tokens[first:last]
            keys.append(k[members].double().mean(0, keepdim=True))
            values.append(v[members].double().mean(0, keepdim=True))
        bias.append(far.cell_offsets.diff()[cells].double().log())
    logits = q[tokens].double() @ torch.cat(keys).T * q.shape[1] ** -0.5 + torch.cat(bias)
    weights = logits.softmax(-1)
    return _Rows(tokens, exact, weights, weights @ torch.cat(values))
