"""Layouts, indices and lists are made on the CPU, whatever torch's default device is."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class _Callers(threading.local):
    """The default device that was in force where this package was called, if it isn't the CPU."""

    device: torch.device | None = None


_CALLERS = _Callers()


def on_cpu(make: Callable[P, R]) -> Callable[P, R]:
    """A function whose new tensors are on the CPU where it names no device.

    It costs a look at the default device. What moves tensors elsewhere still says where. Goes under a
    cache, not over it; not for generators, whose bodies run later.
    """

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        device = torch.get_default_device()
        if device.type == "cpu":
            return make(*args, **kwargs)
        before, _CALLERS.device = _CALLERS.device, device
        try:
            with torch.device("cpu"):
                return make(*args, **kwargs)
        finally:
            _CALLERS.device = before

    return made


def as_called() -> AbstractContextManager[object]:
    """A block inside of `on_cpu` that has the caller's own default device: for code that is the caller's."""
    return nullcontext() if _CALLERS.device is None else _CALLERS.device
