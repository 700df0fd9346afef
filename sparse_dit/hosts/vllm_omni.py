"""A plan in vLLM-Omni, through its registry of attention backends.

vLLM runs `register` in each process (entry-point group `vllm.general_plugins`). The names of vLLM-Omni's
dense backends then lead to subclasses of them, made here when they are first asked for, whose forward follows
the plan; all else stays the backend's own.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
from typing import Any

from ..step_cache import FIRST_BLOCK, StepCache
from .backends import following, share
from .planned import PLAN, Forward, Unknown, named_plan

logger = logging.getLogger("sparse_dit")

HOST = "vLLM-Omni"
# sparse ones are left alone: who chooses them wants them
DENSE = (
    *("FLASH_ATTN", "TORCH_SDPA", "SAGE_ATTN", "SAGE_ATTN_3", "CUDNN_ATTN", "FLASHINFER_ATTN"),
    *("FLASH_ATTN_HUB", "FLASH_ATTN_3_HUB", "TRTLLM_ATTN"),
)


def register() -> None:
    """Let vLLM-Omni's attention follow the plan that `SPARSE_DIT_PLAN` names; without it nothing changes.

    It may be called several times.

    Raises:
        PlanError: If it names no plan.
    """
    if named_plan(HOST, own_cache) is None:
        logger.debug("%s isn't set: %s runs as ever", PLAN, HOST)
        return
    try:
        from vllm_omni.diffusion.attention.backends.registry import (  # pyright: ignore
            DiffusionAttentionBackendEnum,
            register_diffusion_backend,
        )
    except ImportError:
        logger.warning("%s is set, but this vLLM has no vLLM-Omni to follow a plan", PLAN)
        return

    for name, member in DiffusionAttentionBackendEnum.__members__.items():
        ours = f"{__name__}.{name}"
        if name not in DENSE or member.get_path() == ours:
            continue
        if member.is_overridden():
            logger.warning("%s: %s is another plug-in's, and runs without the plan", HOST, name)
            continue
        register_diffusion_backend(member, ours)


def __getattr__(name: str) -> Any:
    """The subclass of a dense backend, by the name that `register` gives for it."""
    if name not in DENSE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _backend(name)


@functools.cache
def _backend(name: str) -> Any:
    from vllm_omni.diffusion.attention.backends.registry import (  # pyright: ignore
        DiffusionAttentionBackendEnum,
    )

    module, _, own = DiffusionAttentionBackendEnum.__members__[name].value.rpartition(".")
    backend, planned = getattr(importlib.import_module(module), own), named_plan(HOST, own_cache)
    assert planned is not None, "nothing is registered without a plan"
    return following(backend, planned, lambda prefix: (None, prefix), _forward, _shard)


def own_cache(cache: StepCache) -> str:
    """The arguments that set Cache-DiT to do what is nearest to a step cache."""
    config: dict[str, Any] = {"enable_taylorseer": True}
    if cache.name == FIRST_BLOCK:
        config = {"residual_diff_threshold": cache.settings["threshold"]}
    return f"--cache-backend cache_dit --cache-config '{json.dumps(config)}'"


def _forward(metadata: Any, tokens: int) -> Forward:
    """Where the forward stands, as the model and its pipeline publish it; nothing is read from a device."""
    from vllm_omni.diffusion.forward_context import (  # pyright: ignore
        get_forward_context,
        is_forward_context_available,
    )

    if not is_forward_context_available():
        raise Unknown("there is no forward context, so the noise level isn't known")
    context = get_forward_context()
    if context.denoise_timestep is None or context.denoise_step_idx is None:
        raise Unknown("this pipeline doesn't publish its step and timestep (record_denoise_step)")
    layout = None if metadata is None else metadata.video_layout
    if metadata is None or layout is None or layout.video_spans or layout.latent_grid is None:
        raise Unknown("this model doesn't publish one video's place in the sequence (video_layout)")
    if metadata.joint_query is not None or metadata.full_attn_spans is not None:
        raise Unknown("queries of a second stream, or spans of causal attention")
    before = layout.prefix_len or 0
    frames, rows, columns = layout.latent_grid
    used = layout.used_len
    if used is None:
        used = before + frames * rows * columns
    bounds = metadata.extra.get("cu_seqlens_q")
    if bounds is not None and len(bounds) > 3:
        raise Unknown("several requests in one sequence")
    if metadata.extra.get("valid_kv_length") not in (None, used):
        raise Unknown(
            f"{metadata.extra['valid_kv_length']} keys are valid, of which {used} are the video's"
        )
    return Forward(
        generation=context,
        step=context.denoise_step_idx,
        sigma=context.denoise_timestep,
        branch="any",
        grid=(frames, rows, columns),
        before=before,
        used=min(used, tokens),
    )


def _shard() -> tuple[int, int]:
    from vllm.distributed import (  # pyright: ignore
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )
    from vllm_omni.diffusion.distributed.parallel_state import (  # pyright: ignore
        get_ring_parallel_world_size,
        get_ulysses_parallel_rank,
        get_ulysses_parallel_world_size,
    )

    return share(
        (get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()),
        (get_ulysses_parallel_rank(), get_ulysses_parallel_world_size()),
        get_ring_parallel_world_size(),
    )
