"""One way to run a host pipeline: the same case and settings give the same video.

The search, the quality report and the demo all generate through `generate`, so that a dense and a
sparse run differ in the attention alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from .case import Case, GenerationSettings
from .generation_size import check_size
from .timing import Taken, Timer
from .words import option

# (index of the step, its timestep as the scheduler gives it, latents after the step)
StepCallback = Callable[[int, float, torch.Tensor], None]


def generate(
    pipe: Any, case: Case, settings: GenerationSettings, callback: StepCallback | None = None
) -> tuple[np.ndarray, Taken]:
    """Run a diffusers pipeline once.

    The noise is drawn on the CPU from `case.seed`, so that it is the same on every device. Only
    arguments that the pipeline's `__call__` takes are passed on.

    Args:
        pipe: A diffusers text-to-video or text-to-image pipeline.
        case: Prompt and seed.
        settings: Size, steps, guidance.
        callback: Called after each step with its index, its timestep and the latents.

    Returns:
        Video `[T, H, W, 3]`, float32 in 0..1 (NaN stays NaN; T is 1 for an image), and how long
        the whole call took.

    Raises:
        ValueError: If the pipeline doesn't take a setting, or can't make the size.
    """
    arguments = call_arguments(pipe, case, settings)
    if callback is not None:
        if not _reports_steps(pipe):
            raise ValueError(f"{type(pipe).__name__} reports no steps: call without a callback")
        arguments["callback_on_step_end"] = _step_end(callback)
    with progress_bars_off(pipe):
        timer = Timer(device_of(pipe))
        result = pipe(**arguments)
        taken = timer.stop()
    return _video(result), taken


class _Enough(Exception):
    """Ends a generation."""


def generate_until(
    pipe: Any, case: Case, settings: GenerationSettings, enough: Callable[[], bool]
) -> float:
    """Run a pipeline until a step has ended and `enough()` is true, without decoding what it has by then.

    One that reports no steps runs to its end. The pipeline is then as after a whole call.

    Args:
        pipe: See `generate`.
        case: Prompt and seed.
        settings: Size, steps, guidance.
        enough: Asked after each step.

    Returns:
        Seconds that it took.

    Raises:
        ValueError: If the pipeline doesn't take a setting, or can't make the size.
    """

    def step_end(step: int, timestep: float, latents: torch.Tensor) -> None:
        if enough():
            raise _Enough

    timer = Timer(device_of(pipe))
    try:
        with suppress(_Enough):
            generate(pipe, case, settings, step_end if _reports_steps(pipe) else None)
    finally:
        pipe.maybe_free_model_hooks()
    return timer.stop().seconds


def call_arguments(pipe: Any, case: Case, settings: GenerationSettings) -> dict[str, Any]:
    """What `pipe(...)` is called with, less the callback: only arguments that it takes.

    Raises:
        ValueError: If the pipeline doesn't take a setting, or can't make the size.
    """
    taken = inspect.signature(type(pipe).__call__).parameters
    wanted = {
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
    if missing := sorted(set(wanted) - set(taken)):
        raise ValueError(
            f"{type(pipe).__name__} takes no {', '.join(map(option, missing))}: leave out what it "
            "doesn't take"
        )
    check_size(pipe, settings, wanted)
    return wanted


@contextmanager
def progress_bars_off(pipe: Any) -> Iterator[None]:
    """Silence the pipeline's own progress bar inside the block; restore its setting after."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def device_of(pipe: Any) -> torch.device:
    """Where the pipeline computes; one that is offloaded lies on the CPU in between."""
    found = getattr(pipe, "_execution_device", pipe.device)
    return found if isinstance(found, torch.device) else torch.device("cpu")


def _reports_steps(pipe: Any) -> bool:
    return "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters


def _step_end(callback: StepCallback) -> Callable[..., dict[str, Any]]:
    def step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        callback(step, float(timestep), tensors["latents"])
        return {}  # nothing changed

    return step_end


def _video(result: Any) -> np.ndarray:
    """The first video of a pipeline's result, `[T, H, W, 3]`."""
    if hasattr(result, "frames"):
        video = np.asarray(result.frames[0])
    elif hasattr(result, "images"):
        video = np.asarray(result.images[0])[None]
    else:
        raise TypeError(f"{type(result).__name__} has neither frames nor images")
    return video.astype(np.float32, copy=False)
