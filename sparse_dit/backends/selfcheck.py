"""Whether a backend computes here what it should: checked once for each device, head_dim and dtype.

Nothing of the GPU backends has been run on all GPUs, and some kernels of others compute dense attention
without a word. So before its first use on a device a backend computes small cases, which differ from
head to head, have a ragged end, shared keys and rows that see nothing; it must agree with the reference.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..entry import FarField
from ..index import PatternIndex, SparseIndex, build_index, runs_of
from ..intervals import RowIntervals
from ..layout import TokenLayout
from ..on_cpu import on_cpu
from ..patterns import Dense, Pattern, Skip, Stripe, Window
from . import reference
from .attended import Attended

TOLERANCES = {  # relative L2 error of a head's output
    torch.float64: 1e-5,
    torch.float32: 5e-3,  # products may be rounded to TF32
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}
HEADS, KEY_HEADS = 4, 2
RAGGED = TokenLayout.video(3, 5, 7, text_before=2, text_after=3)
TOKENS, ROWS, KEYS = 700, 256, 128  # of the case in blocks, which all block sizes divide


@dataclass(frozen=True)
class Verdict:
    """What came out.

    Args:
        error: The largest relative L2 error of a head; None if nothing was computed.
        problem: What is wrong; None if nothing is.
    """

    error: float | None
    problem: str | None


@dataclass(frozen=True)
class _Case:
    index: SparseIndex
    rows: RowIntervals | None


_verdicts: dict[tuple[ModuleType, str, int, torch.dtype], Verdict] = {}
_lock = threading.RLock()


def verdict(
    module: ModuleType, device: torch.device, head_dim: int, dtype: torch.dtype
) -> Verdict | None:
    """The verdict on a backend, kept for the process; None while it can't be found.

    While a CUDA graph is captured nothing else can be computed; the next call outside decides.
    """
    key = (module, str(device), head_dim, dtype)
    found = _verdicts.get(key)
    if found is not None:
        return found
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    with _lock:
        if key not in _verdicts:
            _verdicts[key] = examine(module, device, head_dim, dtype)
        return _verdicts[key]


@on_cpu
def examine(
    module: ModuleType,
    device: torch.device | str,
    head_dim: int,
    dtype: torch.dtype,
    tolerance: float | None = None,
) -> Verdict:
    """Run the test cases that a backend supports. What it raises is reported as its problem.

    Args:
        module: The backend's module.
        device: The device that q, k, v and the index are on.
        head_dim: The number of channels D of q, k and v.
        dtype: The dtype of q, k and v.
        tolerance: The greatest relative L2 error that passes; by default that of the dtype, or the backend's
            own if that is larger.

    Raises:
        torch.OutOfMemoryError: If the device has too little memory, which says nothing about the backend.
    """
    if tolerance is None:
        tolerance = max(TOLERANCES[dtype], getattr(module, "TOLERANCE", 0.0))
    worst, ran, reasons = 0.0, False, []
    for case in _cases(module):
        tensors = _inputs(case, head_dim, dtype)
        here = [x.to(device) for x in tensors]
        index = case.index.to(device)
        if reason := module.unsupported(here[0], index):
            reasons.append(reason)
            continue
        ran = True
        try:
            with torch.no_grad(), without_autocast(torch.device(device).type):
                error, problem = _compare(module, case, tensors, here, index, tolerance)
        except torch.OutOfMemoryError:
            raise
        except Exception as raised:  # a broken backend is what is looked for
            text = " ".join(str(raised).split())[:300]
            return Verdict(None, f"{type(raised).__name__}: {text}")
        if problem:
            return Verdict(error, problem)
        worst = max(worst, error)
    if not ran:
        return Verdict(None, f"it runs none of the cases that it is checked with: {reasons[0]}")
    return Verdict(worst, None)


def _compare(
    module: ModuleType,
    case: _Case,
    tensors: list[Tensor],
    here: list[Tensor],
    index: SparseIndex,
    allowed: float,
) -> tuple[float, str | None]:
    """Error of a case, and what is wrong with it."""
    q = tensors[0]
    scale = q.shape[-1] ** -0.5
    wide_q, wide_k, wide_v = (x.double() for x in tensors)
    truth = reference.forward(wide_q, wide_k, wide_v, case.index, case.rows, scale, True, None)
    rows = case.rows and case.rows.to(here[0].device)
    wants_lse = not (hasattr(module, "lacks") and module.lacks(here[0], True, False))
    got = module.forward(*here, index, rows, scale, wants_lse, None)
    error, problem = _judge(got.out.cpu().double(), truth, allowed)
    if problem is None and got.lse is not None:
        problem = _judge_lse(got.lse.cpu(), truth, allowed)
    return error, problem


def _judge(out: Tensor, truth: Attended, allowed: float) -> tuple[float, str | None]:
    if not bool(out.isfinite().all()):
        return float("inf"), "NaN or Inf in its output"
    assert truth.lse is not None, "it was asked for"
    if bool(out[truth.lse.isneginf()].any()):
        return float("inf"), "rows that see nothing aren't 0"
    off = torch.linalg.vector_norm(out - truth.out, dim=(2, 3))
    error = (off / torch.linalg.vector_norm(truth.out, dim=(2, 3)).clamp_min(1e-30)).max().item()
    if error <= allowed:
        return error, None
    return (
        error,
        f"relative error {error:.2g} of a head against the reference, allowed is {allowed:g}",
    )


def _judge_lse(lse: Tensor, truth: Attended, allowed: float) -> str | None:
    assert truth.lse is not None, "it was asked for"
    empty = truth.lse.isneginf()
    if not torch.equal(lse.isneginf(), empty):
        return "log-sum-exp must be -inf where nothing is seen, and only there"
    off = (lse - truth.lse)[~empty].abs().max().item()
    return None if off <= 2 * allowed else f"log-sum-exp is off by {off:.2g}"


@on_cpu
def refused(
    module: ModuleType, device: torch.device | str, head_dim: int, dtype: torch.dtype
) -> str | None:
    """Why a backend runs none of the cases; None if it runs one."""
    reasons = []
    for case in _cases(module):
        q = torch.empty(1, HEADS, case.index.num_queries, head_dim, dtype=dtype, device=device)
        reasons.append(module.unsupported(q, case.index.to(device)))
    return None if None in reasons else reasons[0]


def _cases(module: ModuleType) -> Iterator[_Case]:
    """Blocks that every kernel can have; these with the rest pooled; patterns with order, pooled keys and an
    interval for each row; and the backend's own cases.
    """
    yield _Case(block_case(), None)
    yield _Case(block_case(far=True), None)
    window = Window(frames=0, rows=1, columns=1)
    patterns = [
        Pattern(Dense()),
        Pattern(window, tile=(2, 2, 2), far=True),
        Pattern(Stripe(time_width=1), tile=(1, None, None), cell=1),
        Pattern(Skip()),
    ]
    yield _Case(build_index(patterns, RAGGED), _ragged_rows())
    for index, rows in module.check_cases() if hasattr(module, "check_cases") else ():
        yield _Case(index, rows)


def _ragged_rows() -> RowIntervals:
    """Windows that begin late and end early, the last key padding, and a row that sees nothing."""
    row = torch.arange(RAGGED.seq_len, dtype=torch.int32)[None]
    stop = (row + RAGGED.seq_len // 2).clamp_max(RAGGED.seq_len - 1)
    return RowIntervals((row - RAGGED.seq_len // 3).clamp_min(0), stop * (row != 7))


@on_cpu
def block_case(far: bool = False) -> SparseIndex:
    """Blocks of 256 rows and 128 keys over 700 tokens, other ones in each head; one row of them empty.

    Args:
        far: Whether each other block is a pooled key.
    """
    generator = torch.Generator().manual_seed(0)
    rows, columns = -(-TOKENS // ROWS), -(-TOKENS // KEYS)
    entries = []
    for head in range(HEADS):
        seen = torch.rand(rows, columns, generator=generator, dtype=torch.float32) < 0.4
        seen[:, head] = True
        seen[head % rows, (head + 1) % columns] = False
        if head == 1:
            seen[1] = False
        entries.append(_of_blocks(seen, far))
    return SparseIndex(tuple(entries), tuple(range(HEADS)))


def _of_blocks(seen: Tensor, far: bool) -> PatternIndex:
    """Index of a bool mask of blocks; a group has 128 rows, two to a block."""
    offsets = (torch.arange(2 * len(seen) + 1) * (ROWS // 2)).clamp_max(TOKENS).unique().int()
    groups = seen.repeat_interleave(2, 0)[: len(offsets) - 1]
    bounds = (torch.arange(seen.shape[1] + 1) * KEYS).clamp_max(TOKENS).int()
    run_offsets, runs = _lists(groups, bounds)
    pooled = None
    if far:
        pooled = FarField(bounds, *_lists(~groups, torch.arange(seen.shape[1] + 1).int()))
    return PatternIndex(TOKENS, TOKENS, None, None, offsets, run_offsets, runs, pooled)


def _lists(groups: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets and runs of what a bool mask of blocks between bounds lets groups see."""
    row, first, last = runs_of(groups)
    counts = torch.bincount(row, minlength=len(groups))
    run_offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    return run_offsets, torch.stack([bounds[first], bounds[last] - bounds[first]], 1)


def _inputs(case: _Case, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    n = case.index.num_queries
    shapes = [(1, heads, n, head_dim) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for shape in shapes
    ]
