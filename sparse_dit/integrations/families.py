"""How a transformer's forward arguments tell token layout, noise level and guidance branch.

Read in the forwards of diffusers 0.42.1, https://github.com/huggingface/diffusers; one entry of
`FAMILIES` for each transformer class.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import TokenLayout
from .call import Branch

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """What must be known of one transformer class.

    Args:
        layers: Regular expression of the module paths of the attention layers whose queries and
            keys are the layout's tokens: no cross-attention, no text refiner.
        layout: Function of (config, forward arguments) -> layout, or None if they don't tell it.
        max_timestep: Value of the forward's `timestep` that is sigma 1.
    """

    layers: str
    layout: Callable[[Any, Arguments], TokenLayout | None]
    max_timestep: float = 1000.0


def _wan(config: Any, arguments: Arguments) -> TokenLayout:
    grid = arguments["hidden_states"].shape[2:]  # [B, C, F, H, W]
    return TokenLayout.video(*(n // p for n, p in zip(grid, config.patch_size, strict=True)))


def _cogvideox(config: Any, arguments: Arguments) -> TokenLayout:
    _, frames, _, height, width = arguments["hidden_states"].shape
    return TokenLayout.video(
        frames // (config.patch_size_t or 1),
        height // config.patch_size,
        width // config.patch_size,
        text_before=arguments["encoder_hidden_states"].shape[1],
    )


def _hunyuan_video(config: Any, arguments: Arguments) -> TokenLayout:
    _, _, frames, height, width = arguments["hidden_states"].shape
    return TokenLayout.video(
        frames // config.patch_size_t,
        height // config.patch_size,
        width // config.patch_size,
        text_after=arguments["encoder_hidden_states"].shape[1],
    )


def _ltx(config: Any, arguments: Arguments) -> TokenLayout | None:
    grid = [arguments.get(name) for name in ("num_frames", "height", "width")]
    if None in grid:  # positions came as video_coords: extra frames may be appended
        return None
    return TokenLayout.video(*(int(n) for n in grid))  # pyright: ignore[reportArgumentType]


def _flux(config: Any, arguments: Arguments) -> TokenLayout | None:
    rows, columns = _raster(arguments["img_ids"], arguments["img_ids"]._version)
    if not rows:
        return None
    return TokenLayout.video(
        1, rows, columns, text_before=arguments["encoder_hidden_states"].shape[1]
    )


@functools.lru_cache(maxsize=2)
def _raster(ids: Tensor, _version: int) -> tuple[int, int]:
    """Rows and columns of Flux' position ids `[N, 3]`, zeros if they aren't one image in order.

    Cached by the tensor's identity and version: a pipeline passes one tensor to all steps, and it
    is read back from the device once.
    """
    table = ids.detach().reshape(-1, 3).cpu().double()
    rows, columns = (int(n) + 1 for n in table.amax(0)[1:])
    whole = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
    return (rows, columns) if torch.equal(table, whole.double()) else (0, 0)


FAMILIES: dict[str, Family] = {
    "WanTransformer3DModel": Family(r"blocks\.\d+\.attn1", _wan),
    "CogVideoXTransformer3DModel": Family(r"transformer_blocks\.\d+\.attn1", _cogvideox),
    "HunyuanVideoTransformer3DModel": Family(
        r"(single_)?transformer_blocks\.\d+\.attn", _hunyuan_video
    ),
    "LTXVideoTransformer3DModel": Family(r"transformer_blocks\.\d+\.attn1", _ltx),
    "FluxTransformer2DModel": Family(
        r"(single_)?transformer_blocks\.\d+\.attn", _flux, max_timestep=1.0
    ),
}

# names that pipelines give to `transformer.cache_context`; "cond_uncond" is both in one batch
BRANCHES: dict[str, Branch] = {
    "cond": "cond",
    "pred_cond": "cond",
    "uncond": "uncond",
    "pred_uncond": "uncond",
}


def family_of(transformer: nn.Module) -> Family | None:
    """The family of a transformer's class or of a class that it derives from."""
    names = (cls.__name__ for cls in type(transformer).__mro__)
    return next((FAMILIES[name] for name in names if name in FAMILIES), None)


def forward_arguments(transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Arguments:
    """Arguments of a forward call by name, however they were passed."""
    return _signature(type(transformer)).bind(transformer, *args, **kwargs).arguments


def sigma_of(family: Family, timestep: Tensor | float) -> float:
    """Noise level of a forward; reads the timestep back from its device."""
    value = timestep.max().item() if isinstance(timestep, Tensor) else timestep
    return float(value) / family.max_timestep


@functools.cache
def _signature(cls: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(cls.forward)
