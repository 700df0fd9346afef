"""Times backends, SDPA and FlexAttention on the same tensors and lists, in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..attention import BACKENDS, attend
from ..backends.attended import Attended
from ..index import SparseIndex
from ..layout import TokenLayout
from .flex import Compiled, flex_call
from .lists import BLOCK, dense
from .measure import Load, Timing, interleaved, watched
from .rows import Row, Skipped
from .truth import check, check_mass

GEMM = 2048
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Size:
    """Tensors of a measurement: `[1, heads, layout.seq_len, head_dim]`, contiguous.

    Args:
        layout: The tokens of the sequence.
        heads, head_dim: The heads H and channels D, the same for queries, keys and values.
        dtype: A name in `DTYPES`.
    """

    layout: TokenLayout
    heads: int
    head_dim: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.layout.seq_len} tokens, head_dim {self.head_dim}, {self.dtype}"


@dataclass(frozen=True)
class Case:
    """What is timed at a size.

    Args:
        pattern: The name of the case in the results.
        index: The query-key pairs that are computed.
        flex: Whether FlexAttention is timed with the same lists, if it can be.
        mass: Whether the backend computes the exact block mass too.
    """

    pattern: str
    index: SparseIndex
    flex: bool = False
    mass: bool = False


@dataclass(frozen=True)
class Conditions:
    """How it is timed.

    Args:
        clock: `"wall"` or `"cpu"`.
        threads: The number of threads that torch computes with.
        rounds: How many times all calls are timed, one after the other.
        flex: Makes FlexAttention for a new set of tensors; None to do without.
        loads: Filled while measuring: how busy others kept the machine, for each set of tensors.
    """

    clock: str
    threads: int
    rounds: int
    flex: Callable[[int], Compiled] | None
    loads: list[Load] = field(default_factory=list)


class _Key(NamedTuple):
    """Who computes which case. A backend may have the name of what backends are compared with.

    Args:
        who: Name of the backend, or of what it is compared with.
        case: Number of the case; -1 for what has none.
        backend: Whether it is a backend.
    """

    who: str
    case: int
    backend: bool


SGEMM = _Key("sgemm", -1, backend=False)
SDPA = _Key("SDPA", -1, backend=False)


def _flex(case: int) -> _Key:
    """FlexAttention as PyTorch has it, beside the backend that is made of it."""
    return _Key("FlexAttention", case, backend=False)


@dataclass
class _Calls:
    """What will be timed."""

    runs: dict[_Key, Callable[[], object]] = field(default_factory=dict)
    errors: dict[_Key, float] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)


def measure(
    size: Size,
    cases: Sequence[Case],
    backends: Sequence[str],
    conditions: Conditions,
    budget: float | None = None,
) -> tuple[list[Row], list[Skipped]]:
    """Check every case once, then time all of them in turn.

    Args:
        size: The tensors: random normal, the same for all.
        cases: What the backends compute; their dense mode is always timed too, as the first row.
        backends: Names in `BACKENDS`; what one can't run is skipped, with its reason.
        conditions: By which clock, on how many threads and how often calls are timed.
        budget: Seconds after which no further round begins.

    Raises:
        WrongResult: If something computes the wrong thing.
        NotImplementedError: If FlexAttention can't be compiled here.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1, size.heads, size.layout.seq_len, size.head_dim)
    tensors = [torch.randn(shape, generator=generator).to(DTYPES[size.dtype]) for _ in range(3)]
    cases = [Case("dense", dense(size.layout, size.heads)), *cases]
    with torch.no_grad():
        calls = _calls(size, tensors, cases, backends, conditions)
        with watched() as load:
            times = interleaved(
                calls.runs, clock=conditions.clock, rounds=conditions.rounds, budget=budget
            )
    conditions.loads.append(load)
    rows = [
        _row(size, cases[key.case], key, times, calls.errors, conditions)
        for key in calls.runs
        if key.backend
    ]
    return rows, calls.skipped


def _calls(
    size: Size,
    tensors: list[Tensor],
    cases: Sequence[Case],
    backends: Sequence[str],
    conditions: Conditions,
) -> _Calls:
    """Everything that is timed, each called and checked once."""
    q, k, v = tensors
    calls = _Calls()
    if q.dtype == torch.float32:  # other dtypes have other peaks
        a = torch.randn(GEMM, GEMM, generator=torch.Generator().manual_seed(1))
        calls.runs[SGEMM] = lambda: a @ a
        calls.runs[SGEMM]()
    calls.runs[SDPA] = lambda: scaled_dot_product_attention(q, k, v)
    check("SDPA", scaled_dot_product_attention(q, k, v), q, k, v, cases[0].index)
    flex = conditions.flex and any(c.flex for c in cases) and conditions.flex(conditions.threads)
    for number, case in enumerate(cases):
        for backend in backends:
            _add_backend(calls, size, tensors, case, number, backend)
        if flex and case.flex:
            call = flex_call(flex, q, k, v, case.index)
            if call is not None:
                check(f"FlexAttention ({case.pattern})", call(), q, k, v, case.index)
                calls.runs[_flex(number)] = call
    return calls


def _add_backend(
    calls: _Calls, size: Size, tensors: list[Tensor], case: Case, number: int, backend: str
) -> None:
    q, k, v = tensors
    key = _Key(backend, number, backend=True)
    reason = BACKENDS[backend].unsupported(q, case.index)
    if reason is None and number and key._replace(case=0) not in calls.runs:
        reason = "its dense mode, which it is compared with, can't run"
    if reason is not None:
        skipped = Skipped(backend, case.pattern, size.head_dim, size.dtype, reason)
        calls.skipped.append(skipped)
        return
    block = BLOCK if case.mass else None

    def call() -> Attended:
        return attend(q, k, v, case.index, backend=backend, mass_block=block)

    name = f"backend {backend!r} ({case.pattern}, {size})"
    result = call()
    calls.errors[key] = check(name, result.out, q, k, v, case.index)
    if block is not None and result.mass is not None:
        check_mass(name, result.mass, q, k, v, case.index, block)
    calls.runs[key] = call


def _row(
    size: Size,
    case: Case,
    key: _Key,
    times: dict[_Key, Timing],
    errors: dict[_Key, float],
    conditions: Conditions,
) -> Row:
    timing = times[key]
    sdpa, own = times[SDPA].seconds, times[key._replace(case=0)].seconds
    flex = times[_flex(key.case)].seconds if _flex(key.case) in times else None
    n, density = size.layout.seq_len, case.index.density
    speedup = sdpa / timing.seconds
    peak = 2e-9 * GEMM**3 / times[SGEMM].seconds if SGEMM in times else None
    return Row(
        key.who, case.pattern, n, size.head_dim, size.heads, size.dtype, conditions.threads, density,
        seconds=timing.seconds,
        sdpa_seconds=sdpa,
        flex_seconds=flex,
        dense_seconds=own,
        speedup=speedup,
        efficiency=speedup * density,
        dense_efficiency=own / timing.seconds * density,
        flex_speedup=None if flex is None else flex / timing.seconds,
        gflops=4e-9 * n * n * size.head_dim * size.heads * density / timing.seconds,
        sgemm_gflops=peak,
        error=errors[key],
        samples=timing.samples,
        spread=timing.spread,
        foreign_cores=conditions.loads[-1].foreign_cores,
    )  # fmt: skip
