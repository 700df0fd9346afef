"""What any of several patterns sees."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..layout import Boxes, TileOrder


class Union:
    """Union of shapes; they share tiles, cells and the far field of the pattern they stand in.

    Args:
        of: At least two shapes, none of them a union.
    """

    __slots__ = ("of",)

    def __init__(self, of: tuple[Any, ...]) -> None:
        if len(of) < 2 or any(isinstance(shape, Union) for shape in of):
            raise ValueError(f"a union takes two or more shapes that aren't unions, got {len(of)}")
        self.of = tuple(of)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Union) and self.of == other.of

    def __hash__(self) -> int:
        return hash(self.of)

    def __repr__(self) -> str:
        return f"Union(of={self.of!r})"

    def covers(self, queries: Boxes, keys: Boxes, where: TileOrder) -> Tensor:
        """Whether a token of each query box sees one of each key box, bool `[Q, K]`."""
        result = self.of[0].covers(queries, keys, where).clone()
        for shape in self.of[1:]:
            result |= shape.covers(queries, keys, where)
        return result
