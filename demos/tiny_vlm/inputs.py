"""What the model takes of a clip and a text: the part of a processor, in PyTorch alone.

transformers' own processor of Qwen2.5-VL needs torchvision.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from demos.tiny_vlm.questions import words

PATCH, MERGE = 4, 2


def to_patches(pixels: Tensor) -> Tensor:
    """Clips `[B, T, 2, 3, S, S]` as `pixel_values_videos` `[B * T * (S / 4) ** 2, 96]`, in Qwen's order.

    A row is a patch, its values channel, time, row, column; patches are ordered by clip, picture, token
    (2 x 2 patches), and place in the token.
    """
    return rearrange(
        pixels * 2 - 1,
        "b t two c (h m p) (w n q) -> (b t h w m n) (c two p q)",
        m=MERGE,
        n=MERGE,
        p=PATCH,
        q=PATCH,
    )


def video_inputs(pixels: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Keyword arguments of the model: a video for each row of `text`, then that row.

    Args:
        pixels: Clips of shape `[B, T, 2, 3, S, S]`, in 0..1; S a multiple of 8.
        text: Token numbers `[B, L]` behind the video.

    Positions are given too, as transformers 5.23 would choose them, since other versions may not: a
    picture is one position after the one before it, and the text goes on at the video's first position
    plus its side in tokens, whatever the number of pictures.
    """
    batch, pictures, side = pixels.shape[0], pixels.shape[1], pixels.shape[-1] // (PATCH * MERGE)
    start, end, video = (
        words().index(f"<|{w}|>") for w in ("vision_start", "vision_end", "video_pad")
    )
    count = pictures * side * side
    ids = torch.cat([torch.full((batch, 1 + count + 1), video), text], 1)
    ids[:, 0], ids[:, 1 + count] = start, end
    place = torch.cartesian_prod(torch.arange(pictures), torch.arange(side), torch.arange(side))
    behind = 1 + side + torch.arange(1 + text.shape[1])
    positions = torch.cat(
        [torch.zeros(3, 1, dtype=torch.long), 1 + place.T, behind.expand(3, -1)], 1
    )
    return {
        "input_ids": ids,
        "position_ids": positions[:, None].expand(-1, batch, -1),
        "mm_token_type_ids": (ids == video).int() * 2,
        "pixel_values_videos": to_patches(pixels),
        "video_grid_thw": torch.tensor([[pictures, side * MERGE, side * MERGE]] * batch),
    }
