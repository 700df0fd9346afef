"""What a pipeline's call takes, and its progress bars: of a stock pipeline, and of a modular one.

A modular pipeline (`diffusers.ModularPipeline`) is a chain of blocks, each of which says what it takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffusers.modular_pipelines.modular_pipeline import ModularPipeline


def call_parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    """The parameters of a pipeline's call by name; a modular one requires none before its blocks run."""
    if not isinstance(pipe, ModularPipeline):
        parameters = dict(inspect.signature(type(pipe).__call__).parameters)
        parameters.pop("self", None)
        return parameters
    kind = inspect.Parameter.KEYWORD_ONLY
    taken = {
        given.name: inspect.Parameter(given.name, kind, default=given.default)
        for given in pipe.blocks.inputs
        if given.name
    }
    return {"output": inspect.Parameter("output", kind, default=None), **taken}


def with_progress_bars(pipe: Any) -> list[Any]:
    """What shows a progress bar while a pipeline runs: itself, or the loops among a modular one's blocks."""
    return list(_loops(pipe._blocks)) if isinstance(pipe, ModularPipeline) else [pipe]


def _loops(blocks: Any) -> Iterator[Any]:
    if hasattr(blocks, "set_progress_bar_config"):
        yield blocks
    for block in getattr(blocks, "sub_blocks", {}).values():
        yield from _loops(block)


@dataclass(frozen=True)
class FrameRule:
    """Which numbers of frames a pipeline of chunks and of bounded length makes: `step * k + first`.

    Attributes:
        step, first: See above; others are rounded up.
        least, most: The bounds, which are such numbers.
    """

    step: int
    first: int
    least: int
    most: int

    def rounded(self, frames: int) -> int:
        """The number of frames that is made where so many are asked for."""
        return frames + (self.first - frames) % self.step

    def allows(self, frames: int) -> bool:
        """Whether so many frames may be asked for."""
        return self.least <= self.rounded(frames) <= self.most

    def __str__(self) -> str:
        return (
            f"{self.step} k + {self.first} from {self.least} to {self.most} (others are rounded up)"
        )


def frame_rule(pipe: Any) -> FrameRule | None:
    """The frames of a pipeline that makes only videos of some seconds (MiniMax-H3); None of others."""
    names = (
        *("vae_frames_per_chunk", "vae_latents_per_chunk"),
        *("fps", "min_duration", "max_duration"),
    )
    found = (getattr(pipe, name, None) for name in names)
    told = [value for value in found if isinstance(value, int | float)]
    if len(told) < len(names):
        return None
    step, first = (int(value) for value in told[:2])
    fps, shortest, longest = told[2:]
    most = int(longest * fps)
    bound = FrameRule(step, first, 0, 0)
    return FrameRule(step, first, bound.rounded(int(shortest * fps)), most - (most - first) % step)
