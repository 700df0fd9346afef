"""Kernels that were launched before, launched again without Triton's look at every argument."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

COMPILED: dict[tuple[Hashable, ...], Any] = {}  # kernels that were launched


def launch(
    module: Any,
    name: str,
    grid: tuple[int, int, int],
    kind: tuple[Hashable, ...],
    options: dict[str, int],
    tensors: tuple[Any, ...],
    numbers: tuple[int, ...],
    scale: float | None,
    constants: tuple[Any, ...],
) -> None:
    """Launch a kernel; after the first time without Triton's look at every argument.

    Args:
        module: The file that the kernel is in.
        name: The kernel's.
        grid: Programs along each axis.
        kind: By what Triton would tell two kernels apart besides constants: dtypes, unaligned addresses.
        options: Triton's, the same for the same constants.
        tensors, numbers, scale, constants: The kernel's arguments, in its order; the first is a tensor on
            the device of the launch, and a scale of None is none.
    """
    long = max(numbers) >= 1 << 31  # Triton's int64
    key = (module.__name__, name, tensors[0].device, long, *kind, *constants)
    factor = () if scale is None else (scale,)
    compiled = COMPILED.get(key)
    if compiled is not None:
        compiled[grid](*tensors, *numbers, *factor, *constants)
        return
    compiled = getattr(module, name)[grid](*tensors, *numbers, *factor, *constants, **options)
    if compiled is not None:  # as it is where kernels are interpreted
        COMPILED[key] = compiled
