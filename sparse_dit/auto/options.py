"""What `patch(pipe, "auto")` is asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..search.objective import Objective

DEFAULT_PSNR = 30.0  # dB: asked for where nothing is


@dataclass(frozen=True, kw_only=True)
class AutoOptions:
    """What is asked of a learned plan.

    Args:
        min_psnr: The PSNR in dB to aim at; 30 if nothing is asked for. Without `verify` it is a forecast:
            nothing is generated to measure it.
        target_speedup: The speed-up of denoising to aim at, with the least error.
        cache: Folder in which plans are kept; `PlanStore.folder` if None, nowhere if empty.
        verify: Make the first generation of a size once more, by the plan that was learned from it, and
            correct the plan by what came out. The pipeline's call returns when that is done.

    Raises:
        ValueError: If both are given, or one is out of range.
    """

    min_psnr: float | None = None
    target_speedup: float | None = None
    cache: str | os.PathLike[str] | None = None
    verify: bool = False

    def __post_init__(self) -> None:
        _ = self.objective

    @property
    def objective(self) -> Objective:
        """The one that is asked for."""
        if self.min_psnr is None and self.target_speedup is None:
            return Objective(min_psnr=DEFAULT_PSNR)
        return Objective(min_psnr=self.min_psnr, target_speedup=self.target_speedup)
