"""Videos as files that every browser plays, and three panels side by side."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..whole_file import whole_file
from .metrics import Video, as_video

MIN_SIDE = 256  # pixels; smaller videos are enlarged so that a person sees something
NAN_COLOUR = (1.0, 0.0, 1.0)  # magenta: a NaN must be seen


def save_video(path: str | Path, video: Video, fps: float = 8, *, min_side: int = MIN_SIDE) -> Path:
    """Write an H.264 mp4 (yuv420p, even sides), replacing `path` at once when it is complete.

    Args:
        path: File to write, ending in `.mp4`; its folder must exist.
        video: `[T, H, W, 3]`, floats in 0..1; NaN is drawn magenta.
        fps: Frames a second.
        min_side: Smaller videos are enlarged by a whole factor, nearest pixel.

    Raises:
        ValueError: If it is no video, the path doesn't end in .mp4, or fps isn't above 0.
    """
    import imageio.v2 as imageio

    path = Path(path)
    if path.suffix != ".mp4":
        raise ValueError(f"a video file must end in .mp4, got {path.name!r}")
    if not fps > 0:
        raise ValueError(f"fps must be > 0, got {fps}")
    frames = even(_repeated(to_uint8(video), min_side))
    with (
        whole_file(path) as partial,
        imageio.get_writer(
            partial,
            format="FFMPEG",  # pyright: ignore[reportArgumentType]
            fps=fps,
            codec="libx264",
            pixelformat="yuv420p",
            macro_block_size=2,
            quality=None,
            output_params=["-preset", "veryfast", "-crf", "16", "-movflags", "+faststart"],
        ) as writer,
    ):
        for frame in frames:
            writer.append_data(frame)  # pyright: ignore[reportAttributeAccessIssue]
    return path


def side_by_side(
    dense: Video, sparse: Video, *, gain: float = 4.0, min_side: int = MIN_SIDE
) -> np.ndarray:
    """Three captioned panels: dense | sparse | absolute difference times `gain`.

    Args:
        dense: `[T, H, W, 3]`.
        sparse: The same shape.
        gain: What the difference is multiplied with; black is equal.
        min_side: Panels are enlarged to at least so many pixels, so that captions can be read.

    Returns:
        Video `[T, H', W', 3]`, even sides.
    """
    dense, sparse = as_video(dense), as_video(sparse)
    if dense.shape != sparse.shape:
        raise ValueError(f"videos must have the same shape, got {dense.shape} and {sparse.shape}")
    difference = np.clip(np.abs(sparse - dense) * gain, 0, 1)
    panels = [
        captioned(enlarge(panel, min_side), text)
        for panel, text in (
            (dense, "dense"),
            (sparse, "sparse"),
            (difference, f"difference x{gain:g}"),
        )
    ]
    gap = np.ones((*panels[0].shape[:2], 4, 3), np.float32)
    return even(np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=2))


def captioned(video: Video, text: str) -> np.ndarray:
    """The video with a white bar on top that holds `text`."""
    video = as_video(video).astype(np.float32, copy=False)
    frames, _, width, _ = video.shape
    size = min(max(12, width // 16), max(8, 2 * width // (len(text) + 1)))
    bar = Image.new("RGB", (width, 2 * size), "white")
    draw = ImageDraw.Draw(bar)
    draw.text((width / 2, size), text, fill="black", anchor="mm", font=ImageFont.load_default(size))
    pixels = np.asarray(bar, np.float32) / 255
    return np.concatenate([np.broadcast_to(pixels, (frames, *pixels.shape)), video], axis=1)


def enlarge(video: Video, min_side: int) -> np.ndarray:
    """Repeat pixels by a whole factor until the shorter side has at least `min_side` of them."""
    return _repeated(as_video(video), min_side)


def _repeated(video: np.ndarray, min_side: int) -> np.ndarray:
    factor = max(1, math.ceil(min_side / min(video.shape[1:3])))
    return video.repeat(factor, axis=1).repeat(factor, axis=2)


def even(video: np.ndarray) -> np.ndarray:
    """Repeat the last row or column where a side is odd: yuv420p needs even ones."""
    _, height, width, _ = video.shape
    return np.pad(video, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def to_uint8(video: Video) -> np.ndarray:
    """The video as bytes 0..255; pixels with a NaN become magenta."""
    video = as_video(video)
    bad = np.isnan(video).any(axis=-1, keepdims=True)
    shown = np.where(bad, np.asarray(NAN_COLOUR, video.dtype), video) if bad.any() else video
    return (np.clip(shown, 0, 1) * 255 + 0.5).astype(np.uint8)
