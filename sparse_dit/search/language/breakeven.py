"""The length of a prompt below which dense attention is faster than a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ...call import AttentionCall
from ...patterns import Pattern
from .candidates import DENSE
from .costs import costs_of, shortened

PARTS = (2, 4, 8, 16)
LEAST = 128
KINDS = 24  # of patterns, the most common ones; a VLM's heads may be as many kinds as they are


def break_even(call: AttentionCall, chosen: Sequence[Pattern]) -> int:
    """Tokens below which a plan's patterns take longer than dense attention, measured on one call.

    Args:
        call: A call at the calibration's length.
        chosen: The pattern of every head of the plan; a layer is timed with each kind in proportion.

    Returns:
        The least length of those tried that is faster; 0 if the plan is all dense.
    """
    shares = Counter(pattern for pattern in chosen if not pattern.is_dense)
    if not shares:
        return 0
    shares = Counter(dict(shares.most_common(KINDS)))
    best = call.q.shape[1]
    for part in PARTS:
        if (tokens := call.q.shape[1] // part) < LEAST:
            break
        short = shortened(call, tokens)
        costs = costs_of(short, [DENSE, *shares])
        dense = min(costs.sparse[0], costs.stock)
        sparse = sum(s * n for s, n in zip(costs.sparse[1:], shares.values(), strict=True))
        if sparse / sum(shares.values()) >= dense:
            break
        best = tokens
    return best
