"""What a backend returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Attended(NamedTuple):
    """Result of an attention call.

    Args:
        out: `[B, H, N, D]`; rows that see nothing are 0.
        lse: float32 `[B, H, N]`, natural log of the sum of exp(logit) over what a row sees, exact and
            pooled; -inf for rows that see nothing. None unless asked for.
        mass: float32 `[B, H, G, ceil(M / mass_block)]`: softmax probability of the keys seen exactly,
            summed over the rows of each query group and over blocks of `mass_block` sorted keys; heads
            with fewer groups than the largest G have zero rows at the end. None unless asked for.
    """

    out: Tensor
    lse: Tensor | None = None
    mass: Tensor | None = None
