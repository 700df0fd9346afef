"""Plans from geometry alone: what most video transformers' heads were found to look at, unmeasured.

Heads attend to their own and neighbouring frames, or to the same place in all frames (Sparse VideoGen, arXiv
2502.01776; Sliding Tile Attention, 2502.04507). Which head does which isn't known without calibration, so
every head computes both; the rest is pooled. Such plans say of themselves that they are uncalibrated, and
promise nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..layout import Tile, TokenLayout
from ..patterns import Pattern, Union, Window
from ..plan import ComponentPlan, HeadChoice, Stage

NOTE = "uncalibrated: geometry only"
DENSE_STEPS = 0.25  # share of the steps, from the noisiest on, that run dense
NEIGHBOURS = 1  # frames on either side of a token's own that it sees
NEARBY = 0.125  # of the rows and columns, on either side, that it sees in all frames


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
