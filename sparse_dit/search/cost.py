"""Seconds, measured: what a head costs at some density, on this device, at this size."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..attention import backend_name, sparse_attention
from ..index import SparseIndex, build_index, pattern_index
from ..layout import Tile, TokenLayout
from ..patterns import Dense, Pattern, Stencil
from ..patterns.pattern import tile_text
from ..timing import timed
from .candidates import tilings
from .cells import cell_table
from .nested import Kind

BUDGETS = (0.02, 0.07, 0.15, 0.3, 0.5, 0.75)
ORDER_BUDGET = 0.2  # density at which token orders are compared
REPEATS = 2
MOST_REPEATS = 20  # of calls so short that single timings are off by a tenth
LONG_ENOUGH = 0.5  # seconds that all timings take together, if that takes no more than MOST_REPEATS
EQUAL = (
    0.08  # token orders that differ by less cost the same, as single timings of one differ by 5 %
)
FITS = 0.2  # root mean square of relative residuals up to which a line is taken for what was timed
LEAST = 1e-3  # of a dense head's seconds: a head that sees nothing is still written


@dataclass(frozen=True)
class CostTable:
    """Seconds of one head in one attention call, batch 1.

    Args:
        layout: The token layout that it was measured at.
        dense: Seconds of PyTorch's dense attention, which a layer runs if all of its heads are dense.
        sparse: Pairs of density and seconds, rising, for patterns without a far field and with one.
        backend: Name of the sparse backend that was timed.
        threads: The number of CPU threads.
        device, dtype: The device's type and the dtype of q, k and v, as text.
        dense_head: Seconds of a dense head beside sparse ones, which the sparse backend computes; as
            `dense` if None.
        index_seconds: What the first call of a pattern at this size takes longer, as its index is built; None
            if unknown.
        source: Name of the device table that it is from; None if it was measured for the search.
        orders: For token orders other than the first of `tilings`, which `sparse` is of: how many times as
            long a head takes at the same density. Tiles that don't divide the video waste part of a block.
        in_generation: How many times as long the same calls take inside a generation; see `pricing.inside`.
        spread: Root mean square of the timings' relative distances from the line that they were smoothed by,
            see `smoothed`; None if the costs are as they were timed.
    """

    layout: TokenLayout
    dense: float
    sparse: dict[bool, tuple[tuple[float, float], ...]]
    backend: str
    threads: int
    device: str
    dtype: str
    dense_head: float | None = None
    index_seconds: float | None = None
    source: str | None = None
    orders: Mapping[Tile, float] = field(default_factory=dict)
    in_generation: float = 1.0
    spread: float | None = None

    @property
    def stock_seconds(self) -> float:
        """Seconds of one attention call of a head in a generation, in a layer that is all dense."""
        return self.dense * self.in_generation

    def seconds(self, kind: Kind | Pattern, density: float) -> float:
        """Seconds of one attention call of a head in a generation, in a layer that isn't all dense.

        They are interpolated in density, and in proportion to it above the greatest one measured.
        """
        if kind.is_dense:
            head = self.dense if self.dense_head is None else self.dense_head
            return head * self.in_generation
        longer = self.orders.get(kind.tile, 1.0) * self.in_generation
        return longer * self._in_the_first_order(kind.far, density)

    def prices(
        self, kinds: Iterable[Kind | Pattern], densities: Iterable[float], calls: int
    ) -> list[float]:
        """Seconds of `calls` calls of a head by each of its candidates, in a layer that isn't all dense."""
        return [self.seconds(*pair) * calls for pair in zip(kinds, densities, strict=True)]

    def _in_the_first_order(self, far: bool, density: float) -> float:
        points = self.sparse[far]
        densities, seconds = zip(*points, strict=True)
        if density > densities[-1]:  # beyond the table: in proportion
            return seconds[-1] * density / densities[-1]
        return float(np.interp(density, densities, seconds))

    def to_dict(self) -> dict[str, Any]:
        """JSON form, for the plan."""
        return {
            "tokens": self.layout.seq_len,
            "dense_seconds": self.dense,
            "dense_head_seconds": self.dense if self.dense_head is None else self.dense_head,
            "masked": [list(point) for point in self.sparse[False]],
            "far_field": [list(point) for point in self.sparse[True]],
            "backend": self.backend,
            "threads": self.threads,
            "device": self.device,
            "dtype": self.dtype,
            "index_seconds": self.index_seconds,
            "device_table": self.source,
            "orders": {tile_text(tile): round(times, 4) for tile, times in self.orders.items()},
            "in_generation": round(self.in_generation, 4),
            "spread": self.spread and round(self.spread, 4),
        }


Costs = Mapping[tuple[int, int], CostTable]  # of each (num_heads, head_dim) that layers have


def measure_cost(
    layout: TokenLayout,
    num_heads: int,
    head_dim: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    budgets: Sequence[float] = BUDGETS,
    orders: Sequence[Tile] = (),
) -> CostTable:
    """Time dense and sparse attention on random data, interleaved; the fastest of at least three of each.

    Indices are built beforehand, as they are at run time; how long that takes is timed on its own, for
    the densest pattern with the far field.

    Args:
        layout: The tokens of the sequence.
        num_heads, head_dim: The heads H of a call, and the channels D of a head.
        device, dtype, backend: As `sparse_attention` takes them.
        budgets: The densities that are timed, without the far field; each is rounded to what the size allows.
        orders: Token orders that are compared with the first one, at one density.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1, layout.seq_len, num_heads, head_dim)  # as hosts hold it
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float32)
        .to(device, dtype)
        .transpose(1, 2)
        for _ in range(3)
    )
    dense = build_index([Pattern(Dense())] * num_heads, layout).to(device)
    runs: dict[Any, Any] = {
        "stock": lambda: F.scaled_dot_product_attention(q, k, v),
        "dense": lambda: sparse_attention(q, k, v, dense, backend=backend),
    }
    last, pattern = (False, 1.0), Pattern(Dense())
    for far, budget in itertools.product((False, True), budgets):
        pattern = nearest_tiles(layout, budget, far)
        index = build_index([pattern] * num_heads, layout).to(device)
        backend = backend_name(q, index, backend)  # so that the table names what was timed
        last = (far, index.density)
        runs[last] = lambda i=index, name=backend: sparse_attention(q, k, v, i, backend=name)
    ordered = {}
    for tile in orders:
        index = build_index([nearest_tiles(layout, ORDER_BUDGET, True, tile)] * num_heads, layout)
        ordered[tile] = index = index.to(device)
        runs["order", tile] = lambda i=index: sparse_attention(q, k, v, i, backend=backend)
    best, spent, rounds = dict.fromkeys(runs, float("inf")), 0.0, 0
    while rounds <= REPEATS or (spent < LONG_ENOUGH and rounds <= MOST_REPEATS):
        for key, run in runs.items():  # the first round fills caches
            seconds = timed(run, q.device)
            best[key] = min(best[key], seconds)
            spent += seconds
        rounds += 1
    first = _first_call(pattern, (q, k, v), layout, backend) - best[last]
    sparse = {
        far: rising([(key[1], s / num_heads) for key, s in best.items() if key[0] is far])
        for far in (False, True)
    }
    table = CostTable(
        layout,
        best["stock"] / num_heads,
        sparse,
        backend,
        torch.get_num_threads(),
        str(q.device),
        str(dtype).removeprefix("torch."),
        best["dense"] / num_heads,
        max(first, 0.0),
    )
    times = {
        tile: best["order", tile] / num_heads / table._in_the_first_order(True, index.density)
        for tile, index in ordered.items()
    }
    return replace(table, orders=times)


def _first_call(
    pattern: Pattern, qkv: tuple[Tensor, Tensor, Tensor], layout: TokenLayout, backend: str
) -> float:
    """Seconds of building a pattern's index and attending with it; the fastest of three."""
    heads = (0,) * qkv[0].shape[1]

    def run() -> None:
        entry = pattern_index.__wrapped__(pattern, layout)  # not the one that is kept
        index = SparseIndex((entry,), heads).to(qkv[0].device)
        sparse_attention(*qkv, index, backend=backend)

    return min(timed(run, qkv[0].device) for _ in range(REPEATS))


def rising(points: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Points by density, seconds never falling: what is slower at a lower density was disturbed."""
    points = sorted(points)
    seconds = np.minimum.accumulate([s for _, s in reversed(points)])[::-1]
    return tuple((d, float(s)) for (d, _), s in zip(points, seconds, strict=True))


def smoothed(table: CostTable) -> CostTable:
    """The table with what single timings are off by taken out, so that a repeated search chooses the same.

    A sparse head costs a fixed part and a part in proportion to its density. One line for all timings, those
    with a far field and the dense head beside sparse ones among them, replaces them if it fits (`FITS`), by
    least squares of relative residuals. Else the points stay as they were timed. Token orders that cost
    the same but for `EQUAL` count as equal, others are told apart in steps of a tenth.

    Args:
        table: Costs that were timed on this device.
    """
    head = table.dense if table.dense_head is None else table.dense_head
    points = np.array([*table.sparse[False], *table.sparse[True], (1.0, head)])
    density, seconds = points.T
    columns = np.stack([np.ones_like(density), density], 1)
    line, *_ = np.linalg.lstsq(columns / seconds[:, None], np.ones_like(seconds), rcond=None)
    spread = float(np.sqrt(np.mean((columns @ line / seconds - 1) ** 2)))
    orders = {
        tile: 1.0 if abs(times - 1) <= EQUAL else round(times, 1)
        for tile, times in table.orders.items()
    }
    fixed, rate = max(0.0, float(line[0])), float(line[1])
    if spread > FITS or rate <= 0:
        return replace(table, orders=orders)
    sparse = {
        far: (
            (0.0, max(LEAST * head, fixed)),
            *((d, fixed + rate * d) for d in (*(d for d, _ in known), 1.0)),
        )
        for far, known in table.sparse.items()
    }
    return replace(table, sparse=sparse, dense_head=fixed + rate, orders=orders, spread=spread)


def break_even_tokens(
    table: CostTable,
    density: float,
    num_heads: int,
    head_dim: int,
    measure: Callable[[TokenLayout], CostTable | None] | None = None,
) -> int:
    """Tokens under which dense attention is faster than a pattern of this density, measured.

    Tried at a half and at a quarter of the calibration's rows and columns; the calibration's own size
    if sparse loses at a half.

    Args:
        table: What attention costs at the calibration's size.
        density: The density of the pattern, in (0, 1].
        num_heads, head_dim: The heads H of a call, and the channels D of a head.
        measure: Gives the costs at another layout, or None if they can't be known; if left out, they are
            measured here.
    """
    measure = measure or _measuring(table, num_heads, head_dim)
    frames, height, width = table.layout.grid
    best = table.layout.seq_len
    for part in (2, 4):
        sides = [min(n, max(4, n // part)) for n in (height, width)]
        small = TokenLayout.video(frames, *sides, text_after=table.layout.num_global)
        if small.seq_len >= best:
            break
        cost = measure(small)
        if (
            cost is None
            or cost.seconds(nearest_tiles(small, density, True), density) >= cost.stock_seconds
        ):
            break
        best = small.seq_len
    return best


def _measuring(
    table: CostTable, num_heads: int, head_dim: int
) -> Callable[[TokenLayout], CostTable]:
    """Measures another size as `table` was."""
    return lambda layout: measure_cost(
        layout,
        num_heads,
        head_dim,
        device=table.device,
        dtype=getattr(torch, table.dtype),
        backend=table.backend,
    )


@functools.lru_cache(maxsize=64)
def nearest_tiles(
    layout: TokenLayout, budget: float, far: bool, tile: Tile | None = None
) -> Pattern:
    """A stencil of the nearest tiles, of about the density `budget`.

    Args:
        layout: The token layout.
        budget: The density without the far field.
        far: Whether the pattern has a far field.
        tile: The token order; the first of `tilings` if None.
    """
    tile = tile or tilings(layout)[0]
    counts = cell_table(layout, tile).counts
    lattice = torch.cartesian_prod(*(torch.arange(1 - n, n) for n in counts.tolist()))
    ranked = lattice[lattice.square().sum(1).argsort(stable=True)]
    pairs = (counts - ranked.abs()).prod(1).double().cumsum(0) / counts.prod().double() ** 2
    keep: Tensor = ranked[: max(1, int((pairs <= budget).sum()))]
    return Pattern(Stencil.from_offsets(keep), tile, far=far)
