"""What a call of the Triton and Gluon backends takes on the host, measured without a GPU.

Kernels are looked up by Triton's own code for each call, as on a GPU, and then neither compiled nor launched;
tensors lie on the CPU. So the driver's launch and the switch to the tensors' device are not in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from ..attention import sparse_attention
from ..backends import gluon
from ..backends import triton as backend
from ..index import build_index
from ..layout import TokenLayout
from ..patterns import Dense, Pattern, SlidingTile, Window
from .measure import interleaved

REPEATED = 200  # calls in one sample: a clock can't see one
NEAR = Pattern(Window(frames=1, rows=2, columns=2), (1, 8, 8))
PATTERNS = {
    "exact": [NEAR, Pattern(SlidingTile(1, 1, 1), (2, 8, 8)), Pattern(Dense())],
    "far field": [replace(NEAR, far=True), NEAR, Pattern(Dense())],
}


FRAME = Pattern(Window(frames=1), (1, None, None))
NEIGHBOURS = {  # whose keys the Gluon kernel loads
    "gluon, exact": [FRAME, Pattern(Dense())],
    "gluon, far field": [replace(FRAME, far=True), FRAME],
}


@dataclass(frozen=True)
class Launch:
    """A kernel launch that was left out.

    Args:
        kernel: The kernel's name.
        grid: The number of programs along each axis.
        arguments: The arguments of the launch, in order.
    """

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


@dataclass
class NullGpu:
    """The launches that would have run on a GPU.

    Args:
        launches: The launches in order; only if `keeping`.
        specialised: Triton's key of each kernel that would have been compiled.
        keeping: Whether to keep launches.
    """

    launches: list[Launch]
    specialised: list[tuple[str, str]]
    keeping: bool = True


@dataclass(frozen=True)
class HostCost:
    """Host time of one call with a cached index, in seconds of one thread.

    Args:
        patterns: A name in `PATTERNS` or `NEIGHBOURS`.
        call: The host time of one call of `sparse_attention`, in seconds.
        launches: The number of kernels that the call launches.
    """

    patterns: str
    call: float
    launches: int


@contextlib.contextmanager
def null_gpu(architecture: int = 80) -> Iterator[NullGpu]:
    """Inside, the Triton and Gluon backends take CPU tensors of float16 and bfloat16; launches do nothing.

    Args:
        architecture: NVIDIA's, as a number; only Triton's own lookup sees it.

    Raises:
        NotImplementedError: If Triton is missing, or interprets kernels in this process.
    """
    if backend._absent() or backend.interpreted():
        raise NotImplementedError(
            "this needs the package triton, and TRITON_INTERPRET not set; install or unset it"
        )
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from ..backends.gluon import kernel as gluon_kernel
    from ..backends.triton import bound, kernel, lay

    made = NullGpu([], [])
    kernels = {name: getattr(kernel, name) for name in ("attend", "pool", "mass")}
    kernels |= {"lay": lay.lay, "gluon": gluon_kernel.attend}
    target = GPUTarget("cuda", architecture, 32)
    fake = mock.Mock(spec_set=["get_current_device", "get_current_stream", "get_current_target"])
    fake.get_current_device = lambda: 0
    fake.get_current_stream = lambda device: 0
    fake.get_current_target = lambda: target
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(backend, "interpreted", lambda: True))
        stack.enter_context(mock.patch.object(gluon, "_on_hopper", lambda device: True))
        stack.enter_context(mock.patch.object(driver, "_active", fake))
        stack.enter_context(mock.patch.object(bound, "COMPILED", {}))
        for name, function in kernels.items():
            caches = type(function.device_caches)(function.create_binder)
            stack.enter_context(mock.patch.object(function, "device_caches", caches))
            compiler = _not_compiled(made, name, function)
            stack.enter_context(mock.patch.object(function, "_do_compile", compiler))
        yield made


def _not_compiled(made: NullGpu, name: str, function: Any) -> Callable[..., Any]:
    """What Triton calls for a kernel that it hasn't compiled."""
    from triton.compiler import CompiledKernel

    class Kernel(CompiledKernel):
        function = packed_metadata = None

        def __init__(self) -> None:
            pass

        def _init_handles(self) -> None:
            pass

        def launch_metadata(self, grid: Any, stream: int, *arguments: Any) -> None:
            return None

        @property
        def run(self) -> Callable[..., None]:
            return self._noted

        def _noted(self, x: int, y: int, z: int, *arguments: Any) -> None:
            if made.keeping:
                made.launches.append(Launch(name, (x, y, z), arguments[6:]))

    def compiled(key: Any, *_: Any) -> Kernel:
        kernel = Kernel()
        made.specialised.append((name, str(key)))
        function.device_caches[0][0][key] = kernel
        return kernel

    return compiled


def measure_host(heads: int = 12, head_dim: int = 128, rounds: int = 9) -> list[HostCost]:
    """Time calls of both backends with null launches, batch 1, bfloat16, at 4,096 tokens.

    The size matters nothing: tables are made at the first call, which doesn't count.

    Raises:
        NotImplementedError: As `null_gpu`.
    """
    layout = TokenLayout.video(4, 32, 32)
    q, k, v = torch.randn(3, 1, layout.seq_len, heads, head_dim, dtype=torch.bfloat16)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    runs, launches = {}, {}
    with null_gpu(90) as gpu, torch.no_grad():
        for name, patterns in {**PATTERNS, **NEIGHBOURS}.items():
            index = build_index((patterns * heads)[:heads], layout)
            kind = "gluon" if name in NEIGHBOURS else "triton"

            def call(index=index, kind=kind) -> object:
                return sparse_attention(q, k, v, index, backend=kind)

            call()
            gpu.launches.clear()
            call()
            launches[name] = len(gpu.launches)
            runs[name] = _often(call)
        gpu.keeping = False
        found = interleaved(runs, clock="cpu", rounds=rounds)
    return [HostCost(name, found[name].seconds / REPEATED, launches[name]) for name in runs]


def _often(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(REPEATED):
            call()

    return run
