"""`torch.autocast`, which casts what PyTorch's own attention gets, on the CPU and on GPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What `torch.autocast` casts attention's inputs to on such devices now; None if it is off."""
    if not torch.amp.is_autocast_available(device_type):
        return None
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def lowered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one call as `scaled_dot_product_attention` would compute with them.

    Under `torch.autocast` for the first one's device, float tensors but float64 are cast to its dtype; else
    nothing is.
    """
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(
        x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A block in which products have the dtype of their factors: what was to be cast has been cast."""
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def in_own_dtypes(compute: Callable[P, R]) -> Callable[P, R]:
    """A function that computes on the CPU, in the dtypes of its tensors under `torch.autocast` too."""

    @functools.wraps(compute)
    def computed(*args: P.args, **kwargs: P.kwargs) -> R:
        with without_autocast("cpu"):
            return compute(*args, **kwargs)

    return computed
