"""What this machine can run, and whether it computes what it should."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .attention import BACKENDS, sparse_attention
from .backends.cpu import library
from .index import SparseIndex, build_index
from .layout import TokenLayout
from .patterns import Dense, Pattern, Skip, Stripe, Window

TOLERANCE = 1e-4  # relative error of float32 against the reference in float64
RAGGED = TokenLayout.video(3, 5, 7, text_before=2, text_after=3)
TIMED = TokenLayout.video(16, 16, 16)
HEADS, HEAD_DIM = 4, 64
VARIANTS = ("avx512_bf16", "avx512", "avx2", "neon", "portable")  # of the CPU kernel, all there are


@dataclass(frozen=True)
class Checkup:
    """One backend on one device.

    Attributes:
        backend: Its name.
        device: `cpu`, `cuda:0`, ...
        error: Relative L2 error against the reference in float64 on a small ragged case.
        problem: What is wrong with it; None if nothing is.
        absent: Why it isn't there at all; None if it is.
        seconds: Of one call at 4,096 tokens, 4 heads; None if not timed.
        dense_seconds: PyTorch's own dense attention on the same tensors.
        density: Of the timed call.
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
        name: As in `VARIANTS`.
        used: Whether it is the one that runs.
        untested: Why it can't be tried on this machine; None if it was.
        checkup: What came out; None if it can't be tried.
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
    """Compare a backend with the reference on a ragged case, and time it beside dense attention.

    Whatever it raises is its problem, and reported as such.
    """
    if absent := BACKENDS[backend].unsupported(_inputs(RAGGED, device)[0], _mixed_index()):
        return Checkup(backend, device, None, None, absent=absent)
    try:
        error = _error(backend, device)
    except Exception as raised:  # a broken backend is what is looked for
        return Checkup(backend, device, None, f"{type(raised).__name__}: {raised}")
    if not error <= TOLERANCE:  # NaN too
        problem = f"relative error {error:.2g} against the reference, allowed is {TOLERANCE:g}"
        return Checkup(backend, device, error, problem)
    if not timed:
        return Checkup(backend, device, error, None)
    pattern = Pattern(Window(frames=1, rows=1, columns=1), far=True)
    index = build_index([pattern] * HEADS, TIMED).to(device)
    q, k, v = _inputs(TIMED, device)
    return Checkup(
        backend,
        device,
        error,
        None,
        _seconds(lambda: sparse_attention(q, k, v, index, backend=backend), device),
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


def _error(backend: str, device: str) -> float:
    index = _mixed_index()
    q, k, v = _inputs(RAGGED, "cpu")
    here = _inputs(RAGGED, device)
    kv_len = torch.tensor([RAGGED.seq_len - 1])
    exact = sparse_attention(
        q.double(), k.double(), v.double(), index, kv_len=kv_len, backend="reference"
    )
    out = sparse_attention(
        here[0], here[1], here[2], index.to(device), kv_len=kv_len.to(device), backend=backend
    )
    difference = out.cpu().double() - exact
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(exact))


def _mixed_index() -> SparseIndex:
    """Four heads that are as different as heads can be."""
    window = Window(frames=0, rows=1, columns=1)
    patterns = [
        Pattern(Dense()),
        Pattern(window, tile=(2, 2, 2), far=True),
        Pattern(Stripe(time_width=1), tile=(1, None, None), cell=1),
        Pattern(Skip()),
    ]
    return build_index(patterns, RAGGED)


def _inputs(layout: TokenLayout, device: str) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (1, HEADS, layout.seq_len, HEAD_DIM)
    return [torch.randn(shape, generator=generator).to(device) for _ in range(3)]


def _seconds(run: Callable[[], Tensor], device: str, repeats: int = 5) -> float:
    """Median duration of a call, after one that doesn't count."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        elif device == "mps":
            torch.mps.synchronize()
        taken.append(time.perf_counter() - started)
    return sorted(taken[1:])[repeats // 2]
