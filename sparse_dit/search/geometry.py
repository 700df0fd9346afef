"""Plans from geometry alone: what most video transformers' heads were found to look at, unmeasured.

Heads attend to their own and neighbouring frames, or to the same place in all frames (Sparse VideoGen, arXiv
2502.01776; Sliding Tile Attention, 2502.04507). Which head does which isn't known without calibration, so
every head computes both; the rest is pooled. Such plans say of themselves that they are uncalibrated, and
promise nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ..index import seen_cells
from ..layout import Tile, TokenLayout, tile_order
from ..patterns import Pattern, Union, Window
from ..plan import ComponentPlan, HeadChoice, Stage

NOTE = "uncalibrated: geometry only"
DENSE_STEPS = 0.25  # share of the steps, from the noisiest on, that run dense
NEIGHBOURS = 1  # frames on either side of a token's own that it sees
NEARBY = 0.125  # of the rows and columns, on either side, that it sees in all frames
# of the density, relative, within which the first reach is taken; dense steps make up the rest
TOLERANCE = 0.1
# preferred from so many rows and columns of tokens on; finer ones only where these come not near enough
TILES = {(1, 8, 8): 24, (1, 4, 4): 8, (1, 2, 2): 1}
MAX_TILES = 4096  # more aren't tried
STEPS = 10  # halvings of an interval of shares


@dataclass(frozen=True)
class Reach:
    """How far every head sees.

    Args:
        neighbours: Whole frames that it sees on either side of a token's own; None: not even its own.
        rows, columns: Share of the rows and columns, on either side, that it sees in all frames.
        first: Whether all see the first frame.
        tile: Frames, rows and columns that are chosen together.
    """

    neighbours: int | None = NEIGHBOURS
    rows: float = NEARBY
    columns: float = NEARBY
    first: bool = True
    tile: Tile = (1, 8, 8)

    @property
    def pattern(self) -> Pattern:
        """What isn't seen is pooled; text is always seen."""
        shape = Window(rows=(0.0, self.rows), columns=(0.0, self.columns))
        if self.neighbours is not None:
            shape = Union((Window(frames=self.neighbours), shape))
        return Pattern(shape, tile=self.tile, far=True, sink_frames=int(self.first))


def one_pattern(
    pattern: Pattern,
    heads: Mapping[str, tuple[int, int]],
    *,
    model_class: str,
    config_hash: str,
    layout: TokenLayout,
    sigma_max: float,
) -> ComponentPlan:
    """The part of one transformer: one pattern for all heads of some layers, below a noise level.

    Args:
        pattern: What every head computes.
        heads: For each of these layers, by module path, `(num_heads, head_dim)`; the others run dense.
        model_class, config_hash, layout: See `ComponentPlan`.
        sigma_max: Noise level above which attention is dense.
    """
    choice = HeadChoice(pattern)
    return ComponentPlan(
        model_class=model_class,
        config_hash=config_hash,
        heads=heads,
        layout=layout,
        stages=(Stage(sigma_max, 0.0),),
        layers={layer: ((choice,) * num_heads,) for layer, (num_heads, _) in heads.items()},
    )


def fitted(layouts: Mapping[TokenLayout, float], density: float) -> Reach:
    """The reach that comes nearest to a density, among those that see as much of time as it allows.

    Neighbouring frames and the first one are given up before the place in all frames is, and large tiles,
    which kernels like, before small ones. A video of one frame has no time: there, heads see what is near
    in the image.

    Args:
        layouts: What layers see, and the share of the pairs of dense attention that each kind has.
        density: Wanted, above 0 and below 1.
    """
    best: tuple[float, Reach] | None = None
    for kind in _kinds(layouts):
        found = _nearest(kind, layouts, density)
        if best is None or found[0] < best[0]:
            best = found
        if found[0] <= TOLERANCE * density:
            break
    assert best is not None, "the smallest tile fits every grid"
    return best[1]


def density_of(pattern: Pattern, layout: TokenLayout) -> float:
    """Computed pairs / all pairs, as an index of the pattern has it, without building one."""
    if layout.num_grid == 0:
        return 1.0
    order = tile_order(layout, pattern.tile)
    seen = seen_cells(pattern, order).double()
    rows = order.tile_offsets.diff().double()
    keys = seen @ rows + (1 - seen).sum(1) + layout.num_global
    pairs = (rows @ keys).item() + layout.num_global * layout.seq_len
    return pairs / layout.seq_len**2


def _kinds(layouts: Mapping[TokenLayout, float]) -> Iterator[Reach]:
    """Reaches to try, by preference; their shares of rows and columns are still to be found."""
    frames, height, width = max((layout.grid for layout in layouts), key=lambda grid: grid[0])
    times = [(NEIGHBOURS, True), (0, True), (0, False), (None, False)]
    tiles = [tile for tile, least in TILES.items() if min(height, width) >= least]
    for tile in tiles:
        count = frames * -(-height // tile[1]) * -(-width // tile[2])
        if tile != tiles[0] and count > MAX_TILES:
            return
        for neighbours, first in times if frames > 1 else times[-1:]:
            yield Reach(neighbours, 0.0, 0.0, first, tile)


def _nearest(
    kind: Reach, layouts: Mapping[TokenLayout, float], density: float
) -> tuple[float, Reach]:
    """The reach of a kind that comes nearest, as far in rows as in columns or a tile further, and how far
    off it is.
    """
    tried: list[tuple[float, Reach]] = []

    def short(rows: float, columns: float) -> float:
        """How much the density is above that of this reach."""
        reach = replace(kind, rows=round(rows, 4), columns=round(columns, 4))
        lacking = density - sum(w * density_of(reach.pattern, x) for x, w in layouts.items())
        tried.append((abs(lacking), reach))
        return lacking

    if short(0.0, 0.0) > 0:
        low, high = 0.0, 1.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if short(middle, middle) > 0 else (low, middle)
        # low and high are a tile apart: one axis alone a tile further gives the densities between
        short(low, high)
        short(high, low)
    return min(tried, key=lambda found: found[0])
