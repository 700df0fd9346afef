"""What a server serves: its model, sizes, plans; and what a request comes to with it."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from ..generation import Case, GenerationSettings
from .errors import invalid
from .options import Limits
from .plans import DENSE, Plans
from .requests import GenerationRequest, JobRequest, VideoRequest
from .spec import JobSpec

SEEDS = 1 << 31
NAMES = {  # of settings, as requests have them
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "num_frames": "num_frames",
}


@dataclass(frozen=True)
class Card:
    """What is known of a model without its weights.

    Attributes:
        name: What requests call it.
        kind: What it makes.
        defaults: Size, steps and guidance of what a request leaves out.
        fps: Frames a second.
        plans: The plans; the first is what a request gets that names none.
        takes_image: Whether it takes an image, and whether it needs one.
        check: Raises ValueError if the model can't make this.
    """

    name: str
    kind: Literal["video", "image"]
    defaults: GenerationSettings
    fps: float
    plans: Plans
    takes_image: Literal["no", "may", "must"]
    check: Callable[[JobSpec], None]

    @property
    def default_plan(self) -> str:
        """What a request gets that names none."""
        return self.plans.names[0]

    def spec_of(self, asked: GenerationRequest, has_input: bool, limits: Limits) -> JobSpec:
        """A request with every default filled in.

        Raises:
            ApiError: If the model can't do it, or it is more than may be.
        """
        if asked.model not in (None, self.name):
            raise invalid(f"model must be {self.name}, got {asked.model!r:.80}", "model")
        _check_image(self, has_input)
        width, height = self.defaults.width, self.defaults.height
        if asked.size is not None:
            width, height = map(int, asked.size.split("x"))
        frames, fps = _frames(self, asked)
        steps = _given(asked.num_inference_steps, self.defaults.steps)
        _check_limits(asked, width * height, frames, steps, limits)
        try:
            spec = JobSpec(
                kind=self.kind,
                prompt=asked.prompt,
                negative_prompt=_given(asked.negative_prompt, self.defaults.negative_prompt),
                seed=secrets.randbelow(SEEDS) if asked.seed is None else asked.seed,
                width=width,
                height=height,
                num_frames=frames,
                fps=fps,
                steps=steps,
                guidance=_given(asked.guidance_scale, self.defaults.guidance),
                guidance_2=asked.guidance_scale_2,
                flow_shift=asked.flow_shift,
                max_sequence_length=self.defaults.max_sequence_length,
                plan=_given(asked.plan, self.default_plan),
                speedup=asked.speedup,
                compare=isinstance(asked, JobRequest) and asked.compare,
                has_input=has_input,
            )
            self.plans.named(spec.plan, spec.speedup)
            self.check(spec)
        except ValueError as error:
            raise invalid(_as_requested(str(error))) from None
        if spec.compare and spec.plan == DENSE:
            raise invalid("compare: dense beside dense says nothing; name a plan", "compare")
        return spec


def checker(outline: Any) -> Callable[[JobSpec], None]:
    """Whether a pipeline can make what a job asks for, told by its outline; None knows nothing."""
    from .engine import job_workload

    def check(spec: JobSpec) -> None:
        spec.settings  # noqa: B018 - which checks its values
        if outline is not None:
            image = Image.new("RGB", (8, 8)) if spec.has_input else None
            job_workload(outline, spec, image).check(Case("any"))

    return check


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _frames(card: Card, asked: GenerationRequest) -> tuple[int, float]:
    """Number of frames, and frames a second."""
    if not isinstance(asked, VideoRequest) or card.kind == "image":
        return 1, card.fps
    fps = _given(asked.fps, card.fps)
    if asked.num_frames is not None:
        return asked.num_frames, fps
    if asked.seconds is not None:
        return max(1, math.floor(asked.seconds * fps + 0.5)), fps
    return card.defaults.num_frames, fps


def _check_image(card: Card, has_input: bool) -> None:
    if has_input and card.takes_image == "no":
        raise invalid(f"{card.name} takes no image: leave out input_reference", "input_reference")
    if not has_input and card.takes_image == "must":
        raise invalid(f"{card.name} needs an image: give input_reference", "input_reference")


def _check_limits(
    asked: GenerationRequest, pixels: int, frames: int, steps: int, limits: Limits
) -> None:
    texts = {"prompt": asked.prompt, "negative_prompt": asked.negative_prompt or ""}
    for name, text in texts.items():
        if len(text) > limits.prompt:
            raise invalid(f"{name} must have at most {limits.prompt:,} characters", name)
    asked_for = (
        ("size", pixels, limits.pixels, "pixels in all"),
        ("num_frames", frames, limits.frames, "frames"),
        ("num_inference_steps", steps, limits.steps, "steps"),
    )
    for name, number, most, unit in asked_for:
        if number > most:
            raise invalid(f"{name} must be at most {most:,} {unit}, got {number:,}", name)


def _as_requested(text: str) -> str:
    """An error of the package in the words of a request."""
    for ours, theirs in NAMES.items():
        name = ours.replace("_", "[_-]")
        text = re.sub(rf"(?<![\w-])(--)?{name}(?= must| \d)", theirs, text)
    return text
