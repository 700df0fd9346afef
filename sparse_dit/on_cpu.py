"""Layouts, indices and lists are made on the CPU, whatever torch's default device is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def on_cpu(make: Callable[P, R]) -> Callable[P, R]:
    """A function whose new tensors are on the CPU where it names no device.

    It costs a look at torch's default device. What belongs elsewhere still has to say where. Goes under a
    cache, not over it; not on a generator function, whose body runs later.
    """

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.get_default_device().type == "cpu":
            return make(*args, **kwargs)
        with torch.device("cpu"):
            return make(*args, **kwargs)

    return made
