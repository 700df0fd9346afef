"""How a transformer's forward arguments tell token layout, noise level and guidance branch."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ...layout import TokenLayout
from ..arrangement import Arrangement
from .way import Way

logger = logging.getLogger("sparse_dit")

Arguments = Mapping[str, Any]


def _heads(config: Any) -> tuple[int, int]:
    return config.num_attention_heads, config.attention_head_dim


@dataclass(frozen=True)
class Family:
    """What must be known of one transformer class.

    Args:
        layers: Regular expression of the module paths of the attention layers whose queries and
            keys are the layout's tokens: no cross-attention, no text refiner.
        layout: Function of (config, forward arguments) -> layout, or None if they don't tell it.
        max_timestep: Value of the forward's `timestep` that is sigma 1.
        clean_timestep: Value of the forward's `timestep` that is sigma 0.
        timestep: Name of the forward's argument that holds the noise level.
        noise: Function of (config, timestep) -> noise level within 0 and 1, for timesteps that aren't linear
            in it; None where `max_timestep` and `clean_timestep` say all.
        heads: Function of config -> (num_heads, head_dim) of these layers; where they differ, a mapping
            of each one's module path to its own.
        image_only: Regular expression of those `layers` that see the video or image without the text.
        arrange: Function of (config, forward arguments) -> what they say of the tokens where layers
            have a mask, instead of `layout`; None if there is no such mask.
        unpadded: Whether layers attend item by item, without the padding at the layout's end.
        two_calls: Whether pipelines that don't name guidance branches run them in two forwards, the
            prompt's first.
        way: Where the grid's tokens enter and leave, so that they can be sorted once a forward; or why they
            can't be.
        tested: What the tests run with the patch on: a whole `"pipeline"`, the `"transformer"` alone, or
            `"nothing"` (a class that a user made known).
    """

    layers: str
    layout: Callable[[Any, Arguments], TokenLayout | None]
    max_timestep: float = 1000.0
    clean_timestep: float = 0.0
    timestep: str = "timestep"
    noise: Callable[[Any, float], float] | None = None
    heads: Callable[[Any], tuple[int, int] | Mapping[str, tuple[int, int]]] = _heads
    image_only: str | None = None
    arrange: Callable[[Any, Arguments], Arrangement | None] | None = None
    unpadded: bool = False
    two_calls: bool = False
    way: Way | str = "where its tokens enter and leave isn't known"
    tested: Literal["pipeline", "transformer", "nothing"] = "pipeline"


def forward_arguments(transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Arguments:
    """Arguments of a forward call by name, however they were passed."""
    return signature_of(type(transformer)).bind(transformer, *args, **kwargs).arguments


def sigma_of(family: Family, config: Any, arguments: Arguments) -> float:
    """Noise level of a forward; reads the timestep back from its device."""
    timestep = arguments[family.timestep]
    span = family.max_timestep - family.clean_timestep
    if isinstance(timestep, Tensor):
        if not timestep.numel():  # no token is noisy
            return 0.0
        timestep = (timestep.max() if span > 0 else timestep.min()).item()
    if family.noise is not None:
        return family.noise(config, float(timestep))
    return (float(timestep) - family.clean_timestep) / span


@functools.cache
def warn_of_other_keys(host: str) -> None:
    """Say once that a model attends to keys that are no queries: such calls bypass the plan."""
    logger.warning(
        "%s attends to cached keys of reference images: these calls run dense and aren't counted",
        host,
    )


@functools.cache
def signature_of(cls: type[nn.Module]) -> inspect.Signature:
    """The signature of a module's forward, `self` included."""
    return inspect.signature(cls.forward)
