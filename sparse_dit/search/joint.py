"""The transformers of a pipeline as one problem: one budget, spent where it does most good.

Damage is the change of the finished video, whichever transformer the error is in, and seconds are those of
the whole generation. So units of several transformers are chosen among as those of one are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from .profile import ComponentProfile
from .solve import Problem

Told = TypeVar("Told")


def pair_shares(
    parts: Mapping[str, ComponentProfile], calls: Mapping[str, Sequence[int]]
) -> dict[str, float]:
    """Each transformer's share in the query-key pairs of a dense generation's attention.

    Args:
        parts: Profiles, by component name.
        calls: For each component and stage the forwards of a generation, times the batch.
    """
    pairs = {
        name: sum(calls[name]) * part.total_heads * part.known_layout.seq_len**2
        for name, part in parts.items()
    }
    total = max(1, sum(pairs.values()))
    return {name: count / total for name, count in pairs.items()}


def joined(
    parts: Mapping[str, Problem], shares: Mapping[str, float], dense_generation: float
) -> Problem:
    """One problem of all units; its stages are those of one transformer after the other.

    Args:
        parts: Problem of each transformer, by component name.
        shares: The share of each transformer in the query-key pairs of a generation, see `pair_shares`.
        dense_generation: Seconds of a whole dense generation.
    """
    placed, first = [], 0
    for name, part in parts.items():
        units = [(first + stage, layer, head) for stage, layer, head in part.units]
        placed.append(replace(part, units=units, weight=part.weight * shares[name]))
        first += len(part.stages)
    columns = {
        field: torch.cat([getattr(part, field) for part in placed])
        for field in (
            "importance", "seconds", "stock_seconds", "error", "density", "recall", "weight",
        )
    }  # fmt: skip
    stock = sum(columns["stock_seconds"].tolist())
    return Problem(
        [unit for part in placed for unit in part.units],
        [patterns for part in placed for patterns in part.candidates],
        **columns,
        stages=tuple(stage for part in placed for stage in part.stages),
        other_seconds=max(0.0, dense_generation - stock),
        components=tuple(name for name, part in parts.items() for _ in part.stages),
    )


def one_or_named(values: Mapping[str, Told]) -> Told | dict[str, Told]:
    """What is said of each transformer: once where it is the same for all, else by component name."""
    first, *others = values.values()
    return first if all(other == first for other in others) else dict(values)
