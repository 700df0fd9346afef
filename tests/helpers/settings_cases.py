"""Settings of a whole process or thread, and what must come out the same under all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

# classes and compiled code: what they hold are no tensors, and to make them anew costs seconds
KEPT = {"patched_class", "_compiled", "_pipe"}


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    """As `torch.set_default_device` sets it; "meta" stands for one that holds nothing of what is on a CPU."""
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As `torch.set_default_dtype` sets it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """As `torch.use_deterministic_algorithms` sets it; new memory is then filled with NaN."""
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """As `torch.set_num_threads` sets it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SETTINGS = {  # several at a time: each has its turn
    "device and float64": lambda: _all(default_device("meta"), default_dtype(torch.float64)),
    "device block and bfloat16": lambda: _all(torch.device("meta"), default_dtype(torch.bfloat16)),
    "modes": lambda: _all(deterministic(), torch.inference_mode(), torch.autocast("cpu")),
}


@contextlib.contextmanager
def _all(*settings: contextlib.AbstractContextManager[object]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for setting in settings:
            stack.enter_context(setting)
        yield


def clear_caches() -> None:
    """Forget every layout, index and list that this process has made."""
    for name, module in list(sys.modules.items()):
        if name.startswith("sparse_dit"):
            for found in list(vars(module).values()):
                if isinstance(found, functools._lru_cache_wrapper) and found.__name__ not in KEPT:
                    found.cache_clear()


def flat(x: object) -> list[object]:
    """The tensors and plain values in a result, in order."""
    if isinstance(x, Tensor) or x is None or isinstance(x, int | float | str | bytes):
        return [x]
    if dataclasses.is_dataclass(x):
        return flat([getattr(x, field.name) for field in dataclasses.fields(x)])
    if isinstance(x, dict):
        return flat([*x.values()])
    return [part for item in x for part in flat(item)]


def differences(ours: list[object], want: list[object]) -> list[str]:
    """What isn't the same, bit for bit, dtype and device included."""
    if len(ours) != len(want):
        return [f"{len(ours)} values instead of {len(want)}"]
    return [
        f"{number}: {a} instead of {b}"
        for number, (a, b) in enumerate(zip(ours, want, strict=True))
        if not _same(a, b)
    ]


def _same(a: object, b: object) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and a == b
    if a.dtype != b.dtype or a.device != b.device or a.shape != b.shape:
        return False
    return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
