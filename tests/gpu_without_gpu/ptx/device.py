"""A GPU that isn't there: inside `emulated_gpu`, launches of the Triton kernels run their PTX for sm_80.

Triton's own code looks kernels up and compiles them, for the arguments of each launch; only the launch
itself is replaced.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton.compiler import CompiledKernel

from sparse_dit.backends.triton import kernel, launch
from sparse_dit.backends.triton.work import Work
from sparse_dit.bench.host import null_gpu

from .decode import decoded
from .machine import Kernel
from .memory import READ, WRITE, GlobalMemory
from .program import parsed

ARCHITECTURE = 80
OUTPUTS = {"attend": {"Out": WRITE, "Lse": WRITE}, "mass": {"Mass": READ | WRITE}}
OUTPUTS |= {"pool": {"Pooled": WRITE, "Cells": WRITE}}
TABLES = ("Heads", "Slots")  # of addresses
Change = Callable[[str, str], str]


@dataclass
class Emulated:
    """What ran.

    Args:
        change: Makes another PTX of a kernel's name and PTX.
        works: What was launched, whose tables the kernels read.
        done: How many blocks executed each instruction of each kernel, by its number.
        blocks: That ran.
        seconds: That they took.
    """

    change: Change | None
    works: list[Work] = field(default_factory=list)
    done: dict[Kernel, Counter[int]] = field(default_factory=dict)
    blocks: int = 0
    seconds: float = 0.0


@contextlib.contextmanager
def emulated_gpu(change: Change | None = None) -> Iterator[Emulated]:
    """Inside, the Triton backend takes CPU tensors of float16 and bfloat16, and runs in the emulator.

    Args:
        change: Called with each kernel's name and PTX; what it returns runs instead.

    Raises:
        NotImplementedError: As `null_gpu`.
        Fault: From a launch, if the kernel does what it must not.
    """
    made = Emulated(change)

    def work_of(*arguments: Any, **keywords: Any) -> Work:
        work = launch_work(*arguments, **keywords)
        made.works.append(work)
        return work

    launch_work = launch.work_of
    with contextlib.ExitStack() as stack:
        stack.enter_context(null_gpu(ARCHITECTURE))
        stack.enter_context(mock.patch.object(launch, "work_of", work_of))
        for name in OUTPUTS:
            function = getattr(kernel, name)
            compiler = functools.partial(_compiled, made, name, function)
            stack.enter_context(mock.patch.object(function, "_do_compile", compiler))
        yield made


def _compiled(
    made: Emulated, name: str, function: Any, key: str, signature: dict[str, str], device: int,
    constants: dict, options: Any, attributes: dict, *_: Any,
) -> Any:  # fmt: skip
    """What Triton calls to compile a kernel; it runs in the emulator."""
    kernels, _, target, *_ = function.device_caches[device]
    source = function.ASTSource(function, signature, constants, attributes)
    built = function.compile(source, target=target, options=options.__dict__)
    text = built.asm["ptx"]
    program = _decoded(made.change(name, text) if made.change else text, built.metadata.shared)

    class Launcher(CompiledKernel):
        function = packed_metadata = None

        def __init__(self) -> None:
            pass

        def _init_handles(self) -> None:
            pass

        def launch_metadata(self, grid: Any, stream: int, *arguments: Any) -> None:
            return None

        def run(self, x: int, y: int, z: int, *arguments: Any) -> None:
            given = dict(zip(signature, arguments[6:], strict=True))
            given = {n: v for n, v in given.items() if signature[n] != "constexpr"}
            _launched(made, name, program, (x, y, z), given)

    kernels[key] = Launcher()
    return kernels[key]


@functools.lru_cache(256)
def _decoded(text: str, shared: int) -> Kernel:
    return decoded(parsed(text), shared)


def _launched(
    made: Emulated, name: str, program: Kernel, grid: tuple[int, ...], given: dict[str, Any]
) -> None:
    """Run one launch over copies of its tensors, and of the tables they point to."""
    outputs = OUTPUTS[name]
    tensors = [(v, outputs.get(n, READ)) for n, v in given.items() if isinstance(v, Tensor)]
    tables = [
        tensor
        for table in made.works[-1].tables
        for field_name, tensor in vars(table).items()
        if field_name != "cost"  # which stays on the host
    ]
    memory = GlobalMemory(tensors + [(t, READ) for t in tables])
    addresses = iter(memory.addresses())
    bits = []
    for parameter, value in given.items():
        if isinstance(value, Tensor):
            bits.append(next(addresses))
            if parameter in TABLES:
                memory.relocate(value)
        elif isinstance(value, float):
            bits.append(int(np.float32(value).view(np.uint32)))
        else:
            bits.append(value & (1 << 64) - 1)
    bits += [0] * (len(program.program.parameters) - len(bits))  # scratch that we don't use
    start = time.perf_counter()
    done = program.run(grid, bits, memory)
    memory.written()
    made.seconds += time.perf_counter() - start
    made.blocks += int(np.prod(grid))
    made.done.setdefault(program, Counter()).update(done)
