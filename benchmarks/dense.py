"""Dense attention by the fastest kernel that is present: flash-attn 3 or 2, xformers, cuDNN, PyTorch's own.

Candidates are compared with PyTorch's own, then timed, once for each device, dtype and shape. On a CPU
there is nothing to choose.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sparse_dit.timing import timed

Dense = Callable[[Tensor, Tensor, Tensor, float], Tensor]
TOLERANCES = {torch.float32: 1e-2, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # relative L2
REPEATS = 5
ALWAYS = "sdpa"


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """PyTorch's own choice; all of these take `[B, H, N, D]` and fewer key heads."""
    shared = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=shared)


def cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """cuDNN's through PyTorch."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v, scale)


def flash_attn_2(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """flash-attn's."""
    from flash_attn import flash_attn_func

    return flash_attn_func(*_tokens_first(q, k, v), softmax_scale=scale).transpose(1, 2)


def flash_attn_3(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """flash-attn 3's; some versions return the log-sum-exp too."""
    from flash_attn_interface import flash_attn_func

    got = flash_attn_func(*_tokens_first(q, k, v), softmax_scale=scale)
    return (got[0] if isinstance(got, tuple) else got).transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """xformers' choice."""
    from xformers.ops import memory_efficient_attention

    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return memory_efficient_attention(*_tokens_first(q, k, v), scale=scale).transpose(1, 2)


CANDIDATES: dict[str, tuple[Dense, str | None]] = {  # and the module that it needs
    "flash_attn_3": (flash_attn_3, "flash_attn_interface"),
    "flash_attn_2": (flash_attn_2, "flash_attn"),
    "xformers": (xformers, "xformers"),
    "cudnn": (cudnn, None),
    ALWAYS: (sdpa, None),
}

_fastest: dict[tuple, str] = {}


def candidates(q: Tensor) -> Mapping[str, Dense]:
    """Kernels that may run for `q`: on CUDA in half precision those that are installed, else one."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return {ALWAYS: sdpa}
    return {
        name: run
        for name, (run, module) in CANDIDATES.items()
        if module is None or importlib.util.find_spec(module) is not None
    }


def measured(q: Tensor, k: Tensor, v: Tensor, scale: float) -> dict[str, float]:
    """Seconds of each candidate that computes what PyTorch's own does; medians of calls in turn."""
    want = sdpa(q, k, v, scale).float()
    runs = {
        name: run
        for name, run in candidates(q).items()
        if name == ALWAYS or _agrees(run, want, q, k, v, scale)
    }
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            taken[name].append(timed(lambda run=run: run(q, k, v, scale), q.device))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def fastest(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str:
    """Name of the fastest candidate for such tensors; measured at the first call, then kept."""
    key = (q.device, q.dtype, q.shape, k.shape)
    if key not in _fastest:
        names = list(candidates(q))
        if len(names) == 1:
            _fastest[key] = names[0]
        else:
            seconds = measured(q, k, v, scale)
            _fastest[key] = min(seconds, key=lambda name: seconds[name])
    return _fastest[key]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Dense attention by the fastest kernel that is present.

    Args:
        q, k, v: `[B, H, N, D]`, `[B, key heads, M, D]`.
        scale: Factor of the logits; `head_dim ** -0.5` if None.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return candidates(q)[fastest(q, k, v, scale)](q, k, v, scale)


def _agrees(run: Dense, want: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether a candidate runs here and computes the same."""
    try:
        got = run(q, k, v, scale).float()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # not for this size, architecture or version: there are others
        return False
    off = torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want).clamp_min(1e-30)
    return bool(off <= TOLERANCES[q.dtype])


def _tokens_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]
