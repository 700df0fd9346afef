"""One way to run a pipeline of diffusers: the same case and settings give the same video.

The search, the quality report and the demo all run it through `Generation`, so that a dense and a sparse run
differ in the attention alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ..generation import Case, GenerationSettings
from ..timing import Taken, Timer
from ..words import option
from .attachment import components
from .modular import call_parameters, with_progress_bars
from .pipeline_size import check_size
from .schedule import flow_shifted, shifted_scheduler

LARGER = 2  # times the rows and the columns


class _Enough(Exception):
    """Ends a generation."""


@dataclass(frozen=True)
class Generation:
    """Videos or images of a pipeline, of one size and made in one way; a `Workload`.

    An output is a video `[T, H, W, 3]`, float32 in 0..1 (NaN stays NaN; T is 1 for an image).

    Args:
        model: A text-to-video or text-to-image pipeline.
        settings: Size, steps, guidance.
        more: Further arguments of the pipeline's call.
        flow_shift: Shift of the noise levels; None keeps the scheduler's own.
    """

    model: Any
    settings: GenerationSettings
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)
    flow_shift: float | None = None
    loss: ClassVar[str] = "mse"
    quality: ClassVar[str] = "psnr_db"

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes; one that is offloaded lies on the CPU in between."""
        found = getattr(self.model, "_execution_device", self.model.device)
        return found if isinstance(found, torch.device) else torch.device("cpu")

    @property
    def has_larger(self) -> bool:
        """Whether a video has frames enough to exchange for `LARGER` times the rows and columns."""
        return self.settings.num_frames >= LARGER**2

    def check(self, case: Case) -> None:
        """Raise ValueError if the pipeline doesn't take a setting, or can't make the size."""
        call_arguments(self.model, case, self.settings, self.more)
        shifted_scheduler(self.model, self.flow_shift)

    def run(
        self, case: Case, after_step: Callable[[torch.Tensor], bool | None] | None = None
    ) -> tuple[np.ndarray | None, Taken]:
        """Generate a case; see `Workload.run`.

        The noise is drawn on the CPU from the case's seed, so that it is the same on every device. Only
        arguments that the pipeline's `__call__` takes are passed on. One that reports no steps calls nothing
        after them, and runs to its end.
        """
        arguments = call_arguments(self.model, case, self.settings, self.more)
        if after_step is not None and reports_steps(self.model):
            arguments["callback_on_step_end"] = _step_end(after_step)
        with progress_bars_off(self.model), flow_shifted(self.model, self.flow_shift):
            timer = Timer(self.device)
            try:
                result = self.model(**arguments)
            except BaseException as error:
                free = getattr(
                    self.model, "maybe_free_model_hooks", None
                )  # a whole call ends with it
                if free is not None:
                    free()
                if not isinstance(error, _Enough):
                    raise
                return None, timer.stop()
            taken = timer.stop()
        return _video(result), taken

    def difference(self, output: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        """The mean squared difference and the PSNR in dB, at most 100."""
        with np.errstate(invalid="ignore"):  # infinite in both
            error = float(np.mean((output - reference) ** 2))
        return {"mse": error, "psnr_db": float(-10 * np.log10(max(error, 1e-10)))}

    def plain(self) -> Generation:
        """The same without guidance, unless the model takes the guidance scale as an input."""
        parts = components(self.model).values()
        if any(getattr(part.config, "guidance_embeds", False) for part in parts):
            return self
        return replace(self, settings=replace(self.settings, guidance=1.0))

    def with_arguments(self, more: Mapping[str, Any], flow_shift: float | None) -> Generation:
        """The same with further arguments and another shift of the noise levels; see `Generation`."""
        return replace(self, more=more, flow_shift=flow_shift)

    def with_steps(self, steps: int) -> Generation:
        """The same in another number of steps."""
        return replace(self, settings=replace(self.settings, steps=steps))

    def reduced(self) -> Generation:
        """Half the height and width (in steps of 32 pixels, at least 64).

        The steps stay: the last one is at a noise level of almost 0 in most schedules and hardly moves the
        video. With one or two steps a stage it would stand for other steps that do, a hundred times as much.
        """

        def half(size: int) -> int:
            return size if size <= 64 else max(64, round(size / 64) * 32)

        height, width = half(self.settings.height), half(self.settings.width)
        return replace(self, settings=replace(self.settings, height=height, width=width))

    def larger(self) -> Generation | None:
        """Twice the height and width and at least a quarter of the frames, the fewest that it takes.

        Without guidance, and of two steps (some schedules have none of one), unless a transformer may
        run only later.
        """
        if not self.has_larger:
            return None
        settings = self.plain().settings
        steps = min(2, settings.steps) if len(components(self.model)) == 1 else settings.steps
        height, width = settings.height * LARGER, settings.width * LARGER
        wide = replace(settings, height=height, width=width, steps=steps)
        for frames in range(settings.num_frames // LARGER**2, settings.num_frames):
            found = replace(self, settings=replace(wide, num_frames=frames))
            try:
                found.check(Case("size"))
            except ValueError:  # a number of frames that the pipeline can't make
                continue
            return found
        return None


def call_arguments(
    pipe: Any, case: Case, settings: GenerationSettings, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What `pipe(...)` is called with, less the callback: only arguments that it takes, and `more`.

    Raises:
        ValueError: If the pipeline doesn't take a setting, or can't make the size.
        TypeError: If it is a transformer alone.
    """
    if isinstance(pipe, nn.Module):
        raise TypeError(f"it takes the pipeline to generate, got a {type(pipe).__name__}")
    taken = call_parameters(pipe)
    wanted: dict[str, Any] = {
        "prompt": case.prompt,
        "height": settings.height,
        "width": settings.width,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "generator": torch.Generator("cpu").manual_seed(case.seed),
        "output_type": "np",
    }
    if settings.num_frames > 1 or "num_frames" in taken:
        wanted["num_frames"] = settings.num_frames
    if settings.max_sequence_length is not None:
        wanted["max_sequence_length"] = settings.max_sequence_length
    if settings.negative_prompt is not None:
        wanted["negative_prompt"] = settings.negative_prompt
    wanted.update(more or {})
    if "guidance_scale" not in taken and settings.guidance == 1:  # which is none
        del wanted["guidance_scale"]
    if missing := sorted(set(wanted) - set(taken)):
        raise ValueError(
            f"{type(pipe).__name__} takes no {', '.join(map(option, missing))}: leave out what it "
            "doesn't take" + f", and give {option('guidance')} 1" * ("guidance_scale" in missing)
        )
    check_size(pipe, settings, wanted)
    return wanted


@contextmanager
def progress_bars_off(pipe: Any) -> Iterator[None]:
    """Silence the pipeline's own progress bar inside the block; restore its setting after."""
    shown = with_progress_bars(pipe)
    before = [dict(getattr(part, "_progress_bar_config", {})) for part in shown]
    for part, config in zip(shown, before, strict=True):
        part.set_progress_bar_config(**{**config, "disable": True})
    try:
        yield
    finally:
        for part, config in zip(shown, before, strict=True):
            part.set_progress_bar_config(**config)


def reports_steps(pipe: Any) -> bool:
    """Whether a pipeline calls back after each step."""
    return "callback_on_step_end" in call_parameters(pipe)


def _step_end(after_step: Callable[[torch.Tensor], bool | None]) -> Callable[..., dict[str, Any]]:
    def step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if after_step(tensors["latents"]):
            raise _Enough
        return {}  # nothing changed

    return step_end


def _video(result: Any) -> np.ndarray:
    """The first video of a pipeline's result, `[T, H, W, 3]`."""
    if hasattr(result, "videos"):  # a modular pipeline's
        video = np.asarray(result.videos[0])
    elif hasattr(result, "frames"):
        video = np.asarray(result.frames[0])
    elif hasattr(result, "images"):
        video = np.asarray(result.images[0])[None]
    else:
        raise TypeError(f"{type(result).__name__} has neither frames, videos nor images")
    return video.astype(np.float32, copy=False)
