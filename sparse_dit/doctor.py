"""What this machine can run, and whether it computes what it should."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .attention import AUTO_DEVICES, BACKENDS
from .backends import selfcheck
from .backends.cpu import library
from .index import SparseIndex, build_index
from .layout import TokenLayout
from .patterns import Pattern, SlidingTile, Window
from .timing import timed

TOLERANCE = 1e-4  # relative error of float32 against the reference in float64
TIMED = TokenLayout.video(16, 16, 16)
HEADS, HEAD_DIM = 4, 64
VARIANTS = ("avx512_bf16", "avx512", "avx2", "neon", "portable")  # of the CPU kernel, all there are


@dataclass(frozen=True)
class Checkup:
    """One backend on one device.

    Attributes:
        backend: The backend's name.
        device: `cpu`, `cuda:0`, ...
        error: Relative L2 error against the reference in float64 on small cases, of the worst head.
        problem: What is wrong with the backend; None if nothing is.
        absent: Why the backend can't run here at all; None if it can.
        seconds: What one call with 4,096 tokens and 4 heads takes; None if not timed.
        dense_seconds: What PyTorch's own dense attention takes on the same tensors; None if not timed.
        density: The density of the timed call, in (0, 1]; None if not timed.
    """

    backend: str
    device: str
    error: float | None
    problem: str | None
    seconds: float | None = None
    dense_seconds: float | None = None
    density: float | None = None
    absent: str | None = None


@dataclass(frozen=True)
class VariantCheckup:
    """One variant of the native CPU kernel.

    Attributes:
        name: The variant's name in `VARIANTS`.
        used: Whether it is the one that runs.
        untested: Why it can't be tried on this machine; None if it was.
        checkup: The result of the test; None if it can't be tried.
    """

    name: str
    used: bool
    untested: str | None
    checkup: Checkup | None


def devices() -> list[str]:
    """Devices that torch sees here."""
    found = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def check_backend(backend: str, device: str, *, timed: bool = True) -> Checkup:
    """Compare a backend with the reference on small cases, and time it beside dense attention.

    Whatever it raises is its problem, and reported as such. GPUs are tried in bfloat16, others in float32.
    """
    module, dtype = BACKENDS[backend], _dtype(device)
    kind = torch.device(device).type
    if kind not in AUTO_DEVICES.get(backend, (kind,)):
        absent = f"on {kind} it runs only by name, and each new size compiles for seconds"
        return Checkup(backend, device, None, None, absent=absent)
    if absent := selfcheck.refused(module, device, HEAD_DIM, dtype):
        return Checkup(backend, device, None, None, absent=absent)
    tolerance = TOLERANCE if kind == "cpu" else None
    found = selfcheck.examine(module, device, HEAD_DIM, dtype, tolerance)
    if found.problem or not timed:
        return Checkup(backend, device, found.error, found.problem)
    q, k, v = _inputs(TIMED, device)
    index = _timed_index(module, q)
    if index is None:
        return Checkup(backend, device, found.error, None)
    return Checkup(
        backend,
        device,
        found.error,
        None,
        _seconds(
            lambda: module.forward(q, k, v, index, None, HEAD_DIM**-0.5, False, None).out, device
        ),
        _seconds(lambda: scaled_dot_product_attention(q, k, v), device),
        index.density,
    )


def checkups() -> list[Checkup]:
    """Every backend but the reference on every device that it is for."""
    names = [name for name in BACKENDS if name != "reference"]
    return [
        check_backend(name, device)
        for device in devices()
        for name in names
        if name != "cpu" or device == "cpu"
    ]


def packages() -> dict[str, str]:
    """Versions of the packages whose kernels are used where they are."""
    wanted = ["triton", "flash-attn", "xformers", "sageattention"]
    wanted += [module.PACKAGE for module in BACKENDS.values() if hasattr(module, "PACKAGE")]
    found = {}
    for name in wanted:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def variant_checkups() -> list[VariantCheckup]:
    """Every variant of the CPU kernel, those that this machine can't try too; none without it."""
    kernel = library.LIBRARY
    if kernel is None:
        return []
    before, found = kernel.running, []
    try:
        for name in VARIANTS:
            checkup, untested = None, None
            if name not in kernel.variants:
                untested = "not compiled: not for this processor, or unknown to the compiler"
            elif name not in kernel.runnable:
                untested = "compiled, but this processor lacks its instructions: not tested here"
            else:
                kernel.use_variant(name)
                checkup = check_backend("cpu", "cpu")
            found.append(VariantCheckup(name, name == before, untested, checkup))
    finally:
        kernel.use_variant(before)
    return found


def _timed_index(module: ModuleType, q: Tensor) -> SparseIndex | None:
    """What a backend is timed with: pooled keys if it has them, else tiles of 256 tokens."""
    near = Window(frames=1, rows=1, columns=1)
    for pattern in (Pattern(near, far=True), Pattern(SlidingTile(1, 1, 1), tile=(4, 8, 8))):
        index = build_index([pattern] * HEADS, TIMED).to(q.device)
        if module.unsupported(q, index) is None:
            return index
    return None


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def _inputs(layout: TokenLayout, device: str) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (1, HEADS, layout.seq_len, HEAD_DIM)
    return [torch.randn(shape, generator=generator).to(device, _dtype(device)) for _ in range(3)]


def _seconds(run: Callable[[], Tensor], device: str, repeats: int = 5) -> float:
    """Median duration of a call, after one that doesn't count."""
    taken = [timed(run, torch.device(device)) for _ in range(repeats + 1)]
    return sorted(taken[1:])[repeats // 2]
