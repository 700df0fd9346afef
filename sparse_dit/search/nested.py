"""A head's candidates: most are stencils that hold one another, and are built when they are asked for.

A search scores a hundred candidates for every head and noise level, and takes one. Scoring needs no more of a
stencil than how many of the best offsets it takes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
from torch import Tensor

from ..layout import Tile, TokenLayout
from ..patterns import Pattern
from .cells import cell_table
from .reach import nested_stencil

Cells = tuple[Tile, int | None]  # token order, and tokens of a pooled key


class Kind(NamedTuple):
    """What a candidate's error is computed from and what it costs at some density depend on.

    Args:
        tile: Token order.
        far: Whether there is a far field.
        pool: Tokens of a pooled key.
        is_dense: Whether everything is computed.
    """

    tile: Tile
    far: bool
    pool: int | None = None
    is_dense: bool = False

    @property
    def cells(self) -> Cells:
        """The sums over cells that the error is computed from."""
        return self.tile, self.pool if self.far else None


def kind_of(pattern: Pattern) -> Kind:
    """The kind of one pattern."""
    return Kind(pattern.tile, pattern.far, pattern.pool, pattern.is_dense)


@dataclass(frozen=True, eq=False)
class Nested:
    """Stencils of one kind: the best offsets of a head, and more and more of them.

    Args:
        kind: Of all of them.
        place: int32, a lattice of offsets: their order, see `reach.ranks`.
        counts: How many offsets each stencil takes, ascending.
        near: The greatest distances of the calibrated size, int64 `[3]`.
        most_runs: Of each, see `reach.nested_stencil`.
    """

    kind: Kind
    place: Tensor
    counts: tuple[int, ...]
    near: Tensor
    most_runs: int

    def __len__(self) -> int:
        return len(self.counts)

    @functools.cached_property
    def _built(self) -> dict[int, Pattern]:
        return {}

    def pattern(self, number: int) -> Pattern:
        """One of them; equal ones are the same object."""
        count = self.counts[number]
        if count not in self._built:
            shape = nested_stencil(self.place, self.counts, number, self.near, self.most_runs)
            kind = self.kind
            self._built[count] = Pattern(shape, kind.tile, far=kind.far, pool=kind.pool)
        return self._built[count]

    def fits(self, layout: TokenLayout) -> bool:
        """Whether a layout has the calibrated one's lattice of offsets, so that `members` holds there."""
        return bool((cell_table(layout, self.kind.tile).counts - 1).equal(self.near))

    def members(self) -> Tensor:
        """The relative tiles of the calibrated size that each stencil sees, bool `[k, L]`."""
        inside = [
            slice(size // 2 - near, size // 2 + near + 1)
            for size, near in zip(self.place.shape, self.near.tolist(), strict=True)
        ]
        place = self.place[tuple(inside)].flatten()
        return place < torch.tensor(self.counts)[:, None]


class Candidates(Sequence[Pattern]):
    """Patterns to choose among, some of which aren't built yet.

    Args:
        parts: Patterns, and nested ones, which count as often as they are long.

    Attributes:
        parts: As given, as a tuple.
        kinds: Of each candidate.
        cells: What the errors of those that aren't dense are computed from, each once.
    """

    def __init__(self, parts: Iterable[Pattern | Nested]) -> None:
        self.parts = tuple(parts)
        self._where = [
            (part, number)
            for part in self.parts
            for number in range(len(part) if isinstance(part, Nested) else 1)
        ]
        self.kinds = tuple(
            part.kind if isinstance(part, Nested) else kind_of(part) for part, _ in self._where
        )
        self.cells = tuple(dict.fromkeys(k.cells for k in self.kinds if not k.is_dense))

    def __len__(self) -> int:
        return len(self._where)

    @overload
    def __getitem__(self, place: int) -> Pattern: ...

    @overload
    def __getitem__(self, place: slice) -> list[Pattern]: ...

    def __getitem__(self, place: int | slice) -> Pattern | list[Pattern]:
        if isinstance(place, slice):
            return [self[n] for n in range(*place.indices(len(self)))]
        part, number = self._where[place]
        return part.pattern(number) if isinstance(part, Nested) else part

    def numbered_parts(self) -> Iterator[tuple[int, Pattern | Nested]]:
        """Each part, with the number of its first candidate."""
        place = 0
        for part in self.parts:
            yield place, part
            place += len(part) if isinstance(part, Nested) else 1
