"""A loaded pipeline that generates what jobs ask for, with another plan for each if need be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..inputs import load_pipeline
from ..integrations import workload
from ..patch import patch
from ..plan import Plan
from ..timing import Taken
from .media import write_media
from .plans import Plans, load_plans
from .spec import JobSpec

FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class Generated:
    """What one generation gave.

    Args:
        video: `[T, H, W, 3]`, floats in 0..1.
        taken: How long it took.
        summary: What ran sparse, what ran dense and why; None without a plan.
    """

    video: np.ndarray
    taken: Taken
    summary: dict[str, Any] | None


@dataclass(frozen=True)
class Engine:
    """A pipeline in this process, and the plans that it may run with.

    The pipeline stays loaded; a plan is patched in for a job and taken off after it.

    Args:
        pipe: A text-to-video, image-to-video or text-to-image pipeline.
        plans: What requests may name.
    """

    pipe: Any
    plans: Plans

    def generate(
        self,
        spec: JobSpec,
        plan: Plan | None,
        after_step: Callable[[Tensor], bool | None],
        image: Image.Image | None = None,
    ) -> Generated | None:
        """Generate once; None if it was ended early.

        Args:
            spec: What to generate.
            plan: What its attention computes; None for stock attention.
            after_step: Called after each step with the latents; if it returns True, the generation ends.
            image: What came with the request.

        Raises:
            ValueError: If the pipeline can't do what is asked.
        """
        work = job_workload(self.pipe, spec, image)
        if plan is None:
            video, taken = work.run(spec.case, after_step)
            return None if video is None else Generated(video, taken, None)
        with patch(self.pipe, plan) as handle:
            video, taken = work.run(spec.case, after_step)
            if video is None:
                return None
            return Generated(video, taken, handle.summary().to_dict())

    def write(
        self, folder: Path, spec: JobSpec, video: np.ndarray, dense: np.ndarray | None
    ) -> None:
        """Write the files of a job; see `write_media`."""
        write_media(folder, spec, video, dense)


def job_workload(pipe: Any, spec: JobSpec, image: Any = None) -> Any:
    """How a pipeline is run for a job."""
    more: dict[str, Any] = {}
    if spec.guidance_2 is not None:
        more["guidance_scale_2"] = spec.guidance_2
    if image is not None:
        more["image"] = image
    work: Any = workload(pipe, spec.settings)
    return work.with_arguments(more, spec.flow_shift)


def load_engine(model: str, dtype: str | None, plans: Sequence[str], device: str) -> Engine:
    """The pipeline on a device, with its plans; a worker's process calls it.

    Args:
        model: Folder or hub id.
        dtype: See `load_pipeline`.
        plans: Plans as they were named to the server.
        device: Where.
    """
    return Engine(load_pipeline(model, device, dtype), load_plans(plans))


def read_image(path: Path, most_pixels: int) -> Image.Image:
    """An uploaded image, decoded.

    Raises:
        ValueError: If it is no PNG, JPEG or WebP, is damaged, or has more pixels than may be.
    """
    try:
        with Image.open(path, formats=FORMATS) as found:
            if found.width * found.height > most_pixels:
                raise ValueError(
                    f"input_reference must have at most {most_pixels:,} pixels, "
                    f"got {found.width} x {found.height}"
                )
            return found.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError("input_reference must be a whole PNG, JPEG or WebP image") from error
