"""Ranks that don't hang on the last bits of a sum.

What is ranked are sums of float32 products. Their last bits depend on the machine, on the number of threads
and on the order in which they were added, so that two processes could choose other places for the same head.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 16  # of 24 that float32 has


def rounded(values: Tensor) -> Tensor:
    """Floating-point `values` to 16 significant bits; what isn't finite stays as it is."""
    mantissa, exponent = torch.frexp(values)
    short = torch.ldexp((mantissa * 2**BITS).round(), exponent - BITS)
    return torch.where(values.isfinite(), short, values)


def best_first(values: Tensor) -> Tensor:
    """Places along the last axis by falling value, int64; of values that are equal but for their last bits
    the first one comes first."""
    return rounded(values).argsort(dim=-1, descending=True, stable=True)
