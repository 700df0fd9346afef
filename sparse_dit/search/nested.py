"""Candidates of a head whose patterns are built only when asked for, and lists of candidates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

from torch import Tensor

from ..layout import Tile, TokenLayout, tile_order
from ..patterns import Pattern
from .cells import cell_table
from .ranking import Ranking

Cells = tuple[Tile, int | None]  # token order, and tokens of a pooled key


class Kind(NamedTuple):
    """What candidates must have in common so that their errors come from the same sums.

    Their cost then depends on their density alone.

    Args:
        tile: The token order.
        far: Whether there is a far field.
        pool: The most tokens that a pooled key stands for; None for all of a cell.
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

    def pattern(self, shape: Any) -> Pattern:
        """A pattern of this kind."""
        return Pattern(shape, self.tile, far=self.far, pool=self.pool)


def kind_of(pattern: Pattern) -> Kind:
    """The kind of one pattern."""
    return Kind(pattern.tile, pattern.far, pattern.pool, pattern.is_dense)


@dataclass(frozen=True, eq=False)
class Nested:
    """Nested stencils of one kind: each takes the best offsets of a head, and more of them than the one
    before.

    Args:
        kind: The kind that all the stencils have.
        ranking: The head's offsets, best first.
        counts: How many offsets each stencil takes, rising.
    """

    kind: Kind
    ranking: Ranking
    counts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.counts)

    @functools.cached_property
    def _built(self) -> dict[int, Pattern]:
        return {}

    def pattern(self, number: int) -> Pattern:
        """The pattern of the stencil with that number; equal ones are the same object."""
        count = self.counts[number]
        if count not in self._built:
            self._built[count] = self.kind.pattern(self.ranking.stencil(self.counts, number))
        return self._built[count]

    def fits(self, layout: TokenLayout) -> bool:
        """Whether a layout has the calibrated one's lattice of offsets, so that `members` holds there."""
        return cell_table(layout, self.kind.tile).counts.equal(self.ranking.table.counts)

    def members(self) -> Tensor:
        """The relative tiles of the calibrated size that each stencil sees, bool `[k, L]`."""
        return self.ranking.members(self.counts)


@dataclass(frozen=True, eq=False)
class Drawn:
    """A pattern that isn't built yet, but of which it is known what it covers at the calibrated size.

    Args:
        kind: The kind of the pattern.
        grid: The calibrated size in tokens: frames, rows and columns, whole tiles of `kind`'s order.
        seen: Gives the tiles that each tile sees, bool `[T, T]`, or `[1, T]` if all tiles see the same; for
            the numbers of some tiles, int64 `[R]`, what these see, `[R, T]` or `[1, T]`.
        shape: Builds the shape of the pattern.
    """

    kind: Kind
    grid: tuple[int, int, int]
    seen: Callable[..., Tensor]
    shape: Callable[[], Any]

    def __len__(self) -> int:
        return 1

    @functools.cached_property
    def _built(self) -> Pattern:
        return self.kind.pattern(self.shape())

    def pattern(self, number: int = 0) -> Pattern:
        """The pattern, built once."""
        return self._built

    def fits(self, layout: TokenLayout) -> bool:
        """Whether `seen` holds for a layout."""
        return tile_order(layout, self.kind.tile).grid == self.grid


Unbuilt = Nested | Drawn


class Candidates(Sequence[Pattern]):
    """Patterns to choose among, some of which aren't built yet.

    Args:
        parts: Patterns, and groups of candidates that aren't built yet.

    Attributes:
        parts: The same as a tuple.
        spans: For each part the numbers of its candidates, and their kind.
        kinds: The kind of each candidate, `[K]`.
        cells: The kinds of cells that errors of sparse candidates are computed from, each once.
    """

    def __init__(self, parts: Iterable[Pattern | Unbuilt]) -> None:
        self.parts = tuple(parts)
        self.spans: list[tuple[range, Kind]] = []
        self._where: list[tuple[Pattern | Unbuilt, int]] = []
        for part in self.parts:
            built = isinstance(part, Pattern)
            kind, count = (kind_of(part), 1) if built else (part.kind, len(part))
            first = len(self._where)
            self.spans.append((range(first, first + count), kind))
            self._where += [(part, number) for number in range(count)]
        self.kinds = tuple(kind for places, kind in self.spans for _ in places)
        self.cells = tuple(dict.fromkeys(kind.cells for kind in self.kinds if not kind.is_dense))

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
        return part if isinstance(part, Pattern) else part.pattern(number)
