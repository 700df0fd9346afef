"""The files that a job leaves: videos, images, thumbnails, previews."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..eval.video import save_video, side_by_side, to_uint8
from .spec import JobSpec, Kind

# what `variant` may be -> file and content type
VARIANTS = {
    "video": ("video.mp4", "video/mp4"),
    "thumbnail": ("thumbnail.webp", "image/webp"),
    "spritesheet": ("spritesheet.jpg", "image/jpeg"),
    "dense": ("dense.mp4", "video/mp4"),
    "side_by_side": ("side_by_side.mp4", "video/mp4"),
}
IMAGE_VARIANTS = {  # of a pipeline that makes images
    "image": ("image.png", "image/png"),
    "thumbnail": ("thumbnail.webp", "image/webp"),
    "dense": ("dense.png", "image/png"),
}
THUMBNAIL_SIDE = 320  # pixels, at most
SPRITES = 16  # frames of a sprite sheet, at most
SPRITE_COLUMNS = 4
PREVIEW_SIDE = 256
PREVIEWS = 4  # of a generation, at most


def write_media(folder: Path, spec: JobSpec, video: np.ndarray, dense: np.ndarray | None) -> None:
    """Write what a job made.

    Args:
        folder: Where to.
        spec: What was asked for.
        video: `[T, H, W, 3]`, floats in 0..1, of an image one frame.
        dense: The same without a plan, if it was asked for.
    """
    frames = to_uint8(video)
    _small(frames[len(frames) // 2], THUMBNAIL_SIDE).save(folder / VARIANTS["thumbnail"][0])
    if spec.kind == "image":
        Image.fromarray(frames[0]).save(folder / IMAGE_VARIANTS["image"][0])
        if dense is not None:
            Image.fromarray(to_uint8(dense)[0]).save(folder / IMAGE_VARIANTS["dense"][0])
        return
    save_video(folder / VARIANTS["video"][0], video, spec.fps)
    _sprites(frames).save(folder / VARIANTS["spritesheet"][0], quality=85)
    if dense is not None:
        save_video(folder / VARIANTS["dense"][0], dense, spec.fps)
        save_video(folder / VARIANTS["side_by_side"][0], side_by_side(dense, video), spec.fps)


def variants(kind: Kind) -> dict[str, tuple[str, str]]:
    """What a job of a kind may make: file and content type by variant, the result itself first."""
    return VARIANTS if kind == "video" else IMAGE_VARIANTS


def preview_name(step: int) -> str:
    """The file of a preview."""
    return f"preview-{step}.webp"


def preview_steps(steps: int) -> set[int]:
    """After which steps a preview is made: a few, spread evenly, not after the last."""
    count = min(PREVIEWS, steps - 1)
    return {round(steps * (n + 1) / (count + 1)) for n in range(count)}


def has_preview(spec: JobSpec, step: int) -> bool:
    """Whether a preview is made after a step of a job, which is counted through all its generations."""
    return step <= spec.total_steps and (step - 1) % spec.steps + 1 in preview_steps(spec.steps)


def preview_of(latents: Tensor) -> Image.Image | None:
    """Latents as a small picture: the middle frame, its three strongest components as colours.

    Args:
        latents: `[B, C, H, W]` or `[B, C, T, H, W]`.

    Returns:
        None for latents in another form, whose rows and columns aren't known.
    """
    if latents.ndim == 5:
        latents = latents[:, :, latents.shape[2] // 2]
    if latents.ndim != 4:
        return None
    pixels = latents[0].detach().float().cpu().flatten(1)  # [C, H * W]
    pixels = torch.nan_to_num(pixels - pixels.mean(1, keepdim=True))
    values, vectors = torch.linalg.eigh(pixels @ pixels.T)
    del values  # rising
    basis = vectors[:, -3:].flip(1)
    basis = basis * basis.sum(0).sign().where(basis.sum(0) != 0, torch.ones(1))
    colours = (basis.T @ pixels).reshape(-1, *latents.shape[-2:])
    colours = colours.expand(3, -1, -1) if len(colours) == 1 else colours[[0, 1, -1]]
    spread = colours.flatten(1).std(1, correction=0).clamp(min=1e-6)[:, None, None]
    shown = (colours / (4 * spread) + 0.5).clamp(0, 1)
    picture = Image.fromarray((shown.permute(1, 2, 0) * 255).byte().numpy())
    factor = max(1, PREVIEW_SIDE // max(picture.size))
    return picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC
    )


def _small(frame: np.ndarray, side: int) -> Image.Image:
    picture = Image.fromarray(frame)
    picture.thumbnail((side, side))
    return picture


def _sprites(frames: np.ndarray) -> Image.Image:
    """Frames spread over the video, in rows of four."""
    count = min(SPRITES, len(frames))
    chosen = [frames[round(n * (len(frames) - 1) / max(1, count - 1))] for n in range(count)]
    pictures = [_small(frame, THUMBNAIL_SIDE // 2) for frame in chosen]
    width, height = pictures[0].size
    columns = min(SPRITE_COLUMNS, count)
    sheet = Image.new("RGB", (columns * width, math.ceil(count / columns) * height))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * width, number // columns * height))
    return sheet
