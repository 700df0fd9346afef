"""Small pixel pictures of attention and of masks, and images as data URIs.

Letters in shapes: S side of a square map (queries down, keys across, in the head's token order).
"""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..index import PatternIndex

EXACT = (253, 231, 37)  # bright: computed
FAR = (33, 120, 135)  # muted: seen as pooled keys
UNSEEN = (24, 16, 38)  # dark: not seen at all
_RUNS_AT_ONCE = 1 << 15


def mask_map(entry: PatternIndex, size: int = 96) -> np.ndarray:
    """How much of each part of the attention matrix a head computes, without building the matrix.

    Args:
        entry: One pattern at one size.
        size: Largest side of the map; fewer tokens give a map of one pixel a token.

    Returns:
        float32 `[S, S, 2]`: the fraction of pairs seen exactly, and of pairs represented by the far
        field, in the order of the head's sorted tokens.
    """
    rows = _edges(entry.num_queries, size)
    columns = _edges(entry.num_keys, size)
    start, stop = _spans(entry.runs)
    exact = _coverage(start, stop, entry.run_offsets, columns)
    far = torch.zeros_like(exact)
    if entry.far is not None:
        first, last = _spans(entry.far.runs)
        cells = entry.far.cell_offsets.long()
        far = _coverage(cells[first], cells[last], entry.far.run_offsets, columns)
    groups = entry.q_offsets.long()
    weight = _overlap(rows[:-1], rows[1:], groups)  # [S, G] rows of a group in a row of pixels
    area = (rows.diff()[:, None] * columns.diff()[None, :]).double()
    return torch.stack([weight @ exact / area, weight @ far / area], -1).float().numpy()


def mask_image(fractions: np.ndarray) -> Image.Image:
    """A mask map `[S, S, 2]` as a picture: bright exact, muted far field, dark not seen."""
    exact, far = fractions[..., :1], fractions[..., 1:]
    rest = np.clip(1 - exact - far, 0, 1)
    mixed = exact * np.array(EXACT) + far * np.array(FAR) + rest * np.array(UNSEEN)
    return Image.fromarray(np.clip(mixed + 0.5, 0, 255).astype(np.uint8))


def attention_image(attention: np.ndarray, size: int = 96) -> Image.Image:
    """An attention map `[S, S]` as a picture, square-root scale up to its 99.5th percentile.

    Raises:
        ValueError: If it isn't a square map of at most 128 x 128 numbers >= 0.
    """
    attention = np.asarray(attention, np.float32)
    if attention.ndim != 2 or not attention.size or max(attention.shape) > 128:
        raise ValueError(f"an attention map must be [S, S] with S <= 128, got {attention.shape}")
    bad = ~np.isfinite(attention)
    known = np.where(bad, 0, attention)
    if known.min() < 0:
        raise ValueError(f"attention can't be negative, got {known.min():.3g}")
    top = np.quantile(known, 0.995) or known.max() or 1.0
    from matplotlib import colormaps

    pixels = (colormaps["magma"](np.sqrt(np.clip(known / top, 0, 1)))[..., :3] * 255).astype(
        np.uint8
    )
    pixels[bad] = (255, 0, 255)
    image = Image.fromarray(pixels)
    return (
        image.resize((size, size), Image.Resampling.BOX) if max(attention.shape) > size else image
    )


def data_uri(image: Image.Image, kind: str = "png") -> str:
    """The image inside a URI, so that a page needs no file beside it; `kind` is png or jpeg."""
    buffer = io.BytesIO()
    if kind == "png":
        image.quantize(64).save(buffer, "png", optimize=True)
    else:
        image.save(buffer, "jpeg", quality=85)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _edges(tokens: int, size: int) -> Tensor:
    """int64 `[S + 1]`: where pixels start, and where the last one ends."""
    side = min(size, tokens)
    return torch.arange(side + 1) * tokens // side


def _spans(runs: Tensor) -> tuple[Tensor, Tensor]:
    return runs[:, 0].long(), (runs[:, 0] + runs[:, 1]).long()


def _overlap(low: Tensor, high: Tensor, bounds: Tensor) -> Tensor:
    """float64 `[n, m]`: tokens that span n shares with the stretch between two bounds."""
    shared = torch.minimum(high[:, None], bounds[None, 1:]) - torch.maximum(
        low[:, None], bounds[None, :-1]
    )
    return shared.clamp_min(0).double()


def _coverage(start: Tensor, stop: Tensor, offsets: Tensor, columns: Tensor) -> Tensor:
    """float64 `[G, S]`: keys of each pixel column that each group's spans hold."""
    groups = len(offsets) - 1
    owner = torch.repeat_interleave(torch.arange(groups), offsets.long().diff())
    total = torch.zeros(groups, len(columns) - 1, dtype=torch.float64)
    for at in range(0, len(start), _RUNS_AT_ONCE):
        part = slice(at, at + _RUNS_AT_ONCE)
        total.index_add_(0, owner[part], _overlap(start[part], stop[part], columns))
    return total
