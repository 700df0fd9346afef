"""How much errors of attention matter where nobody measured it: assumed from the embedded model.

`sensitivity` measures it by some dozen generations at a reduced size. Where there is no time for these, as in
a user's own generation, what was measured on the embedded model (six layers, flow matching, 12 steps) stands
for all: errors at high noise move the video most, and so do those of the first layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..plan import Stage
from .sensitivity import Sensitivity

SCALE = 0.02  # mean squared change of pixels for each unit of noise level, near noise level .5
FIRST_LAYER = 4.0  # times as much as another
POINTS = 64  # of a stage


def assumed_sensitivity(stages: Sequence[Stage], layers: int) -> Sensitivity:
    """The sensitivity of a transformer that wasn't measured.

    The density over noise level sigma is `SCALE * sigma ** 0.7 / (1.02 - sigma) ** 1.5`, fitted to four
    stages of the embedded model, which it meets within a factor of 1.25.

    Args:
        stages: Its stages of noise levels.
        layers: The number of its layers.
    """
    weights = [FIRST_LAYER, *[1.0] * (layers - 1)]
    return Sensitivity([_of(stage) for stage in stages], [w / sum(weights) for w in weights])


def _of(stage: Stage) -> float:
    """The density's integral over a stage."""
    width = stage.progress_max - stage.progress_min
    middles = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
    sigma = stage.progress_min + width * middles
    return SCALE * width * (sigma**0.7 / (1.02 - sigma) ** 1.5).mean().item()
