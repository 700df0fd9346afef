"""Flux: text tokens, then image tokens."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...layout import TokenLayout
from .family import Arguments, Family


def _flux(config: Any, arguments: Arguments) -> TokenLayout | None:
    rows, columns = raster(arguments["img_ids"], arguments["img_ids"]._version)
    if not rows:
        return None
    return TokenLayout.video(
        1, rows, columns, text_before=arguments["encoder_hidden_states"].shape[1]
    )


@functools.lru_cache(maxsize=2)
def raster(ids: Tensor, _version: int) -> tuple[int, int]:
    """Rows and columns of Flux' position ids `[N, 3]`, zeros if they aren't one image in order.

    Cached by the tensor's identity and version: a pipeline passes one tensor to all steps, and it
    is read back from the device once.
    """
    table = ids.detach().reshape(-1, 3).cpu().double()
    rows, columns = (int(n) + 1 for n in table.amax(0)[1:])
    whole = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
    return (rows, columns) if torch.equal(table, whole.double()) else (0, 0)


FAMILIES = {
    "FluxTransformer2DModel": Family(
        r"(single_)?transformer_blocks\.\d+\.attn", _flux, max_timestep=1.0
    ),
}
