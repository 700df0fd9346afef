"""Step caches of diffusers: enabled on a transformer, and told from what is enabled."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..step_cache import FIRST_BLOCK, TAYLORSEER, StepCache

OUTPUT = "proj_out"  # whose output TaylorSeer foretells, so that blocks needn't run


def enable_step_cache(transformer: nn.Module, cache: StepCache) -> object:
    """Enable a step cache of diffusers on a transformer that has none, and return its configuration.

    Raises:
        ValueError: If the transformer's class isn't known to the cache, or one is enabled already.
    """
    what: Any = transformer
    kind = type(transformer).__name__
    if not hasattr(transformer, "enable_cache"):
        raise ValueError(f"{kind} takes no step cache of diffusers; leave {cache} out")
    if cache.name == TAYLORSEER and not isinstance(getattr(transformer, OUTPUT, None), nn.Module):
        raise ValueError(f"{kind} has no {OUTPUT} for {TAYLORSEER}; try {FIRST_BLOCK}")
    if cache_config(transformer) is not None:
        raise ValueError(
            f"this {kind} has a step cache already; call transformer.disable_cache() first"
        )
    config = _config(cache)
    try:
        what.enable_cache(config)
    except ValueError as error:
        what._cache_config = config  # so that what is hooked already comes off
        what.disable_cache()
        raise ValueError(f"{kind} doesn't take the step cache {cache}: {error}") from None
    return config


def disable_step_cache(transformer: nn.Module, config: object) -> None:
    """Disable a step cache, unless the one that is enabled now is another."""
    what: Any = transformer
    if config is not None and cache_config(transformer) is config:
        what.disable_cache()


def reset_step_cache(transformer: nn.Module) -> None:
    """Let the step cache that is enabled, if any, forget what it holds."""
    what: Any = transformer
    if cache_config(transformer) is not None:
        what._reset_stateful_cache()


def cache_config(transformer: nn.Module) -> object | None:
    """The configuration of the step cache that is enabled on a transformer."""
    return getattr(transformer, "_cache_config", None)


def enabled_step_cache(transformer: nn.Module) -> StepCache | str | None:
    """The step cache that is enabled; of one that isn't known here the name of its configuration's class."""
    config: Any = cache_config(transformer)
    kind = type(config).__name__
    if config is None:
        return None
    try:
        if kind == "FirstBlockCacheConfig":
            return StepCache(FIRST_BLOCK, {"threshold": config.threshold})
        if kind == "TaylorSeerCacheConfig" and config.use_lite_mode and config.max_order == 1:
            first, last = config.disable_cache_before_step, config.disable_cache_after_step
            if last is None:
                return StepCache(TAYLORSEER, {"interval": config.cache_interval, "first": first})
    except ValueError:  # settings that a plan can't have
        pass
    return kind


def _config(cache: StepCache) -> Any:
    # here, as versions without them patch all the same
    from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
    from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig

    if cache.name == FIRST_BLOCK:
        return FirstBlockCacheConfig(threshold=cache.settings["threshold"])
    return TaylorSeerCacheConfig(
        cache_interval=int(cache.settings["interval"]),
        disable_cache_before_step=int(cache.settings["first"]),
        max_order=1,
        taylor_factors_dtype=torch.float32,  # one output of the whole transformer, so it is small
        use_lite_mode=True,
    )
