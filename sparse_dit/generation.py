"""What to generate, and how: a prompt with its seed, and the settings that all of a comparison share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from .texts import unfit
from .words import option

MAX_SEED = (1 << 63) - 1
MOST = {"height": 1 << 16, "width": 1 << 16, "num_frames": 1 << 16, "steps": 10_000}
MOST_TEXT = 1 << 16  # tokens


@dataclass(frozen=True)
class Case:
    """One thing to generate: a prompt and the seed of its noise."""

    prompt: str
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"a prompt must be text that is not empty, got {self.prompt!r:.80}")
        if why := unfit(self.prompt):  # or it couldn't be noted in a plan in the end
            raise ValueError(f"a prompt {why}: {self.prompt!r:.80}")
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        if not whole or not 0 <= self.seed <= MAX_SEED:
            raise ValueError(
                f"a seed must be a whole number >= 0, at most 2^63 - 1, got {self.seed!r}"
            )


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a text are drawn.

    Args:
        temperature: 0 takes the most likely one.
        top_p: Share of the probability that is drawn from, the most likely tokens first; None is all of it.
        seed: The seed of the draws.
    """

    temperature: float = 0.0
    top_p: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate: size, steps and guidance, the same for every case of a comparison.

    Attributes:
        height: Pixels, a multiple of what the pipeline asks for.
        width: Pixels, likewise.
        num_frames: Frames of video; 1 for pipelines that make one image.
        steps: Denoising steps.
        guidance: Classifier-free (or embedded) guidance scale.
        max_sequence_length: Text tokens; None keeps the pipeline's own value.
        negative_prompt: None keeps the pipeline's own value.
    """

    height: int
    width: int
    num_frames: int = 1
    steps: int = 20
    guidance: float = 5.0
    max_sequence_length: int | None = None
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_frames", "steps", "max_sequence_length"):
            value = getattr(self, name)
            if name == "max_sequence_length" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{option(name)} must be a whole number >= 1, got {value!r}")
            if value > (most := MOST.get(name, MOST_TEXT)):
                raise ValueError(f"{option(name)} must be at most {most:,}, got {value:,}")
        if not np.isfinite(self.guidance) or self.guidance < 0:
            raise ValueError(
                f"{option('guidance')} must be a finite number >= 0, got {self.guidance!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dict, one key per field."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> GenerationSettings:
        """The settings that `to_dict` wrote; ValueError for unknown keys."""
        known = {field.name for field in fields(GenerationSettings)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"unknown generation settings {unknown}; expected {sorted(known)}")
        return GenerationSettings(**data)
