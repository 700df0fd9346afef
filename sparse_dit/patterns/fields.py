"""Checked field types of pattern parameters (pydantic)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

MAX_EXTENT = 1 << 20

CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)

Count = Annotated[int, Field(strict=True, ge=1, le=MAX_EXTENT)]
Distance = Annotated[int, Field(strict=True, ge=0, le=MAX_EXTENT)]
Offset = Annotated[int, Field(strict=True, ge=-MAX_EXTENT, le=MAX_EXTENT)]
Flag = Annotated[bool, Field(strict=True)]
Elastic = tuple[
    Annotated[float, Field(strict=True, ge=-MAX_EXTENT, le=MAX_EXTENT)],
    Annotated[float, Field(strict=True, ge=0, le=1)],
]
Extent = Distance | Elastic | None
Lattice = tuple[Count, Count, Count]
Refresh = Annotated[int, Field(strict=True, ge=1, le=1 << 14)] | None  # steps


def extent(value: Any, length: int) -> int:
    """Resolve an `Extent` on an axis of `length`: a distance, `(alpha, beta)`, or None (all).

    An elastic extent is `floor(alpha + beta * length)`, never below 0.
    """
    if value is None:
        return length
    if isinstance(value, tuple):
        return max(0, int(value[0] + value[1] * length))
    return value
