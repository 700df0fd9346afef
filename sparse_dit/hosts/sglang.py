"""A plan in SGLang's diffusion server, through its plug-ins.

SGLang runs `register` in each process (entry-point group `sglang.multimodal_gen.plugins`). Attention layers
then get a subclass of the backend that SGLang chose for them, whose forward follows the plan; all else stays
the backend's own.
"""

from __future__ import annotations

import functools
import logging
import re
import weakref
from typing import Any

from ..step_cache import FIRST_BLOCK, StepCache
from .backends import following, share
from .planned import PLAN, Forward, Unknown, named_plan

logger = logging.getLogger("sparse_dit")

HOST = "SGLang"
PACKAGE = "sglang.multimodal_gen.runtime"
SELECTOR = f"{PACKAGE}.layers.attention.selector.get_attn_backend"
WHOLE_NOISE = 1000.0  # the timestep that is all noise
_read: tuple[weakref.ref[Any], list[float]] | None = None  # of the request that ran last


def register() -> None:
    """Let SGLang's attention follow the plan that `SPARSE_DIT_PLAN` names; without it nothing changes.

    Raises:
        PlanError: If it names no plan.
    """
    if named_plan(HOST, own_cache) is None:
        logger.debug("%s isn't set: %s runs as ever", PLAN, HOST)
        return
    from sglang.multimodal_gen.runtime.platforms.plugins import (  # pyright: ignore
        HookRegistry,
        HookType,
    )

    HookRegistry.register(SELECTOR, chosen, HookType.AFTER)


def chosen(backend: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs after SGLang chose a backend: what follows the plan, or None to leave the choice as it is."""
    if kwargs.get("is_cross_attention") or backend.get_enum().is_sparse:
        return None
    return _planned(backend)


@functools.cache
def _planned(backend: Any) -> Any:
    planned = named_plan(HOST, own_cache)
    assert planned is not None, "there is no hook without a plan"
    return following(
        backend, planned, lambda prefix: (_component(), layer_of(prefix)), _forward, _shard
    )


def own_cache(cache: StepCache) -> str:
    """The environment variables that set Cache-DiT to do what is nearest to a step cache."""
    more = "TAYLORSEER=true"
    if cache.name == FIRST_BLOCK:
        more = f"RDT={cache.settings['threshold']:g}"
    return f"SGLANG_CACHE_DIT_ENABLED=true SGLANG_CACHE_DIT_{more}"


def layer_of(prefix: str) -> str:
    """The module path that diffusers has for a layer that SGLang calls `prefix`."""
    layer = prefix.removesuffix(".impl")
    if match := re.fullmatch(r"(?:.*\.)?double_blocks\.(\d+)\.attn", layer):
        return f"transformer_blocks.{match[1]}.attn"
    if match := re.fullmatch(r"(?:.*\.)?single_blocks\.(\d+)\.attn", layer):
        first = int(_dit_config().num_layers)  # single blocks are counted on behind the double ones
        return f"single_transformer_blocks.{int(match[1]) - first}.attn"
    return layer


def _component() -> str | None:
    from sglang.multimodal_gen.runtime.layers.attention.selector import (  # pyright: ignore
        get_component_attn_backend_name,
    )

    return get_component_attn_backend_name()


def _dit_config() -> Any:
    from sglang.multimodal_gen.runtime.server_args import (  # pyright: ignore
        get_global_server_args,
    )

    return get_global_server_args().pipeline_config.dit_config


def _forward(metadata: Any, tokens: int) -> Forward:
    """Where the forward stands, from the request that it is of; its timesteps are read back once."""
    del metadata, tokens
    from sglang.multimodal_gen.runtime.managers.forward_context import (  # pyright: ignore
        get_forward_context_or_none,
    )

    context = get_forward_context_or_none()
    request = None if context is None else context.forward_batch
    if context is None or request is None:
        raise Unknown("the forward is of no request, so neither its grid nor its noise is known")
    step, latent = context.current_timestep, request.raw_latent_shape
    if latent is None or len(latent) != 5:
        raise Unknown("the request has no raw_latent_shape of five sizes, so the grid isn't known")
    return Forward(
        generation=request,
        step=step,
        sigma=_sigma(request, step),
        branch="uncond" if request.is_cfg_negative else "cond",
        grid=_grid(tuple(int(n) for n in latent[2:])),
    )


def _sigma(request: Any, step: int) -> float:
    global _read
    if _read is None or _read[0]() is not request:
        if request.timesteps is None:
            raise Unknown("the request has no timesteps, so the noise level isn't known")
        _read = weakref.ref(request), request.timesteps.flatten().tolist()
    times = _read[1]
    if not 0 <= step < len(times):
        raise Unknown(f"step {step} isn't among the request's {len(times)} timesteps")
    return times[step] / WHOLE_NOISE


def _grid(latent: tuple[int, ...]) -> tuple[int, int, int]:
    config = _dit_config()
    size = config.patch_size
    if isinstance(size, int):
        size = (getattr(config, "patch_size_t", 1), size, size)
    if len(size) != 3 or any(n % p for n, p in zip(latent, size, strict=True)):
        raise Unknown(f"latents of {latent} aren't whole patches of {tuple(size)}")
    frames, rows, columns = (n // p for n, p in zip(latent, size, strict=True))
    return frames, rows, columns


def _shard() -> tuple[int, int]:
    from sglang.multimodal_gen.runtime.distributed.parallel_state import (  # pyright: ignore
        get_ring_parallel_world_size,
        get_tp_rank,
        get_tp_world_size,
        get_ulysses_parallel_rank,
        get_ulysses_parallel_world_size,
    )

    return share(
        (get_tp_rank(), get_tp_world_size()),
        (get_ulysses_parallel_rank(), get_ulysses_parallel_world_size()),
        get_ring_parallel_world_size(),
    )
