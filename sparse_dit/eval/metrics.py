"""How close one video is to another.

Videos are `[T, H, W, 3]`, floats in 0..1, NumPy arrays or tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from skimage.metrics import structural_similarity

Video = np.ndarray | torch.Tensor
SSIM_SIDE = 11  # pixels, of its window


def psnr(a: Video, b: Video) -> float:
    """Peak signal-to-noise ratio in dB over all pixels and frames, peak 1.

    Returns:
        dB; `inf` if the videos are equal in every value, NaN if either holds one.

    Raises:
        ValueError: If the shapes differ, or it is not a float video.
    """
    a, b = _same_shape(a, b)
    error = float(np.mean(np.square(a - b)))
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(a: Video, b: Video) -> float:
    """Structural similarity, mean over frames and colours, 1 for equal videos.

    Gaussian window of sigma 1.5 (11 x 11 pixels) and population covariance, as in Wang et al. 2004,
    https://doi.org/10.1109/TIP.2003.819861, computed by scikit-image.

    Raises:
        ValueError: If the shapes differ, it is not a float video, or a frame is under 11 x 11 pixels.
    """
    a, b = _same_shape(a, b)
    if min(a.shape[1:3]) < SSIM_SIDE:
        raise ValueError(f"SSIM needs frames of at least 11 x 11 pixels, got {a.shape[1:3]}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan
    frames = [
        structural_similarity(
            x,
            y,
            data_range=1.0,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for x, y in zip(a, b, strict=True)
    ]
    return float(np.mean(frames))


@dataclass(frozen=True)
class Metric:
    """One measure of how close a sparse video is to the dense one, in the report beside PSNR.

    Args:
        label: The table's head.
        measure: Called with the sparse and the dense video.
        least_side: Pixels that frames must have in height and width.
    """

    label: str
    measure: Callable[[Video, Video], float]
    least_side: int = 1


# by their names in report.json; one that is added here is measured, written and shown
METRICS = {"ssim": Metric("SSIM", ssim, SSIM_SIDE)}


def flat_psnr(video: Video) -> float:
    """PSNR in dB of a video against its own mean colour, over all frames.

    What a picture without any content would score: a sparse video that isn't clearly above it has
    kept nothing that matters.
    """
    video = as_video(video)
    mean = video.mean(axis=(0, 1, 2), keepdims=True, dtype=np.float64).astype(video.dtype)
    return psnr(np.broadcast_to(mean, video.shape), video)


def relative_error(a: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative L2 error `|a - reference| / |reference|`; NaN if both the error and norm are 0/0."""
    if a.shape != reference.shape:
        raise ValueError(f"shapes must be equal, got {tuple(a.shape)} and {tuple(reference.shape)}")
    norm = torch.linalg.vector_norm(reference.double())
    error = torch.linalg.vector_norm(a.double() - reference.double())
    return 0.0 if error == 0 else float(error / norm)


def drift(latents: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> list[float]:
    """Relative L2 distance of two runs' latents after each step, `reference` being the dense one.

    Raises:
        ValueError: If the runs have different numbers of steps, or shapes differ.
    """
    if len(latents) != len(reference):
        raise ValueError(
            f"both runs must have the same steps, got {len(latents)} and {len(reference)}"
        )
    return [relative_error(a, b) for a, b in zip(latents, reference, strict=True)]


def nonfinite(video: Video) -> int:
    """How many values of a video are NaN or infinite."""
    return int(np.size(video) - np.isfinite(as_video(video)).sum())


def mean_db(values: Iterable[float]) -> float:
    """Mean of PSNRs in dB over several videos.

    Equal videos (`inf`) are left out, unless all are: they would hide how far off the others are.
    """
    values = list(values)
    if not values:
        return math.nan
    kept = [value for value in values if value != math.inf]
    return float(np.mean(kept)) if kept else math.inf


def as_video(video: Video) -> np.ndarray:
    """The video as a NumPy array; ValueError if it isn't float `[T, H, W, 3]`."""
    array = (
        video.detach().float().cpu().numpy()
        if isinstance(video, torch.Tensor)
        else np.asarray(video)
    )
    if array.ndim != 4 or array.shape[-1] != 3 or not array.size:
        raise ValueError(f"a video must be [T, H, W, 3], got shape {array.shape}")
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"a video must hold floats in 0..1, got {array.dtype}: divide by 255")
    return array


def _same_shape(a: Video, b: Video) -> tuple[np.ndarray, np.ndarray]:
    a, b = as_video(a), as_video(b)
    if a.shape != b.shape:
        raise ValueError(f"videos must have the same shape, got {a.shape} and {b.shape}")
    return a.astype(np.float64), b.astype(np.float64)
