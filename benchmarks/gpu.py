"""Check, then time every backend on a GPU against the best dense kernel present; fit the forecasting model.

    python -m benchmarks.gpu --json gpu.json --plot gpu.png
    python -m benchmarks.gpu --dry         # tiny sizes on the CPU, Triton interpreted: says nothing of speed

The grid is that of `sparse-dit bench kernel`. A backend that fails its check is not timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if "--dry" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before its kernels are imported

import torch
from torch import Tensor

from benchmarks import dense as dense_kernels
from benchmarks.tile_model import fit
from sparse_dit.attention import BACKENDS, attend
from sparse_dit.backends import selfcheck
from sparse_dit.bench.kernel import DTYPES
from sparse_dit.bench.lists import build, dense, layout_of
from sparse_dit.bench.measure import Timing, interleaved
from sparse_dit.bench.plot import save_plot
from sparse_dit.bench.truth import WrongResult, check
from sparse_dit.doctor import packages
from sparse_dit.environment import environment
from sparse_dit.index import SparseIndex
from sparse_dit.whole_file import whole_file

BLOCK_Q, BLOCK_K = 128, 64  # of the model's tiles
DRY_BACKENDS = ("cpu", "triton", "gather")
REAL = {"tokens": ["8192", "16384", "32768"], "head_dim": [64, 128], "heads": 8, "rounds": 9,
        "density": [0.25, 0.125, 0.0625, 0.03], "dtype": ["bfloat16"],
        "pattern": ["blocks", "far", "columns"]}  # fmt: skip
DRY = {"tokens": ["256", "512"], "head_dim": [64], "heads": 2, "rounds": 1, "density": [0.5],
       "dtype": ["float32"], "pattern": ["blocks", "far"]}  # fmt: skip


@dataclass
class Row:
    """One call; times are medians of seconds, batch 1.

    Args:
        backend, pattern, tokens, head_dim, heads, dtype, density: What was called.
        seconds, spread, error: Its time, the samples' quartile distance, and its error.
        dense_kernel, sdpa_seconds: The best dense kernel present, and its time in the same rounds.
        speedup, efficiency: Against that; efficiency is speed-up times density.
        forecast_seconds: By the model fitted to the backend's dense calls; None for these.
        flex_seconds: None; FlexAttention is a backend of its own here.
    """

    backend: str
    pattern: str
    tokens: int
    head_dim: int
    heads: int
    dtype: str
    density: float
    seconds: float
    spread: float
    error: float | None
    dense_kernel: str
    sdpa_seconds: float
    speedup: float
    efficiency: float
    forecast_seconds: float | None = None
    flex_seconds: float | None = None


@dataclass
class _Call:
    name: str
    pattern: str
    density: float
    error: float | None
    run: Callable[[], object]


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; exit code 2 without a GPU, 1 if a backend fails its check."""
    options = _options(arguments)
    if not options.dry and not torch.cuda.is_available():
        print(
            "error: this needs a GPU that torch sees; --dry runs tiny sizes on the CPU",
            file=sys.stderr,
        )
        return 2
    device = "cpu" if options.dry else "cuda"
    verdicts = _verdicts(options, device)
    good = {(v["backend"], v["head_dim"], v["dtype"]) for v in verdicts if not v["problem"]}
    rows: list[Row] = []
    skipped: list[dict[str, str]] = []
    for tokens, dim, dtype in itertools.product(options.tokens, options.head_dim, options.dtype):
        able = [name for name in options.backend if (name, dim, dtype) in good]
        rows += _measure(options, device, (tokens, dim, dtype), able, skipped)
    models = _forecast(rows, _slots(device))
    _print(rows, models)
    if options.dry:
        print(
            "a dry run: its times are of this CPU and of an interpreter, and say nothing of a GPU"
        )
    report = {
        "version": 1, "dry": options.dry, "environment": {**environment(device), **packages()},
        "verdicts": verdicts, "rows": [dataclasses.asdict(row) for row in rows],
        "skipped": skipped, "models": models,
    }  # fmt: skip
    if options.json:
        with whole_file(options.json) as partial:
            partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        save_plot(rows, options.plot, baseline="the best dense kernel")
    return 1 if any(v["problem"] and not v["absent"] for v in verdicts) else 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    for name, kind in (("tokens", str), ("head-dim", int), ("density", float), ("dtype", str),
                       ("pattern", str), ("backend", str)):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, nargs="+")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    for name, value in (DRY if options.dry else REAL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.backend is None:
        every = [name for name in BACKENDS if name not in ("reference", "cpu")]
        options.backend = list(DRY_BACKENDS) if options.dry else every
    for given, known in ((options.backend, BACKENDS), (options.dtype, DTYPES)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{unknown[0]!r} must be one of {', '.join(known)}")
    return options


def _verdicts(options: argparse.Namespace, device: str) -> list[dict]:
    """Every backend's check at every head_dim and dtype."""
    found = []
    for name, dim, dtype in itertools.product(options.backend, options.head_dim, options.dtype):
        module, kind = BACKENDS[name], DTYPES[dtype]
        absent = selfcheck.refused(module, device, dim, kind)
        verdict = None if absent else selfcheck.examine(module, device, dim, kind)
        problem, error = (absent, None) if verdict is None else (verdict.problem, verdict.error)
        found.append({"backend": name, "head_dim": dim, "dtype": dtype, "error": error,
                      "problem": problem, "absent": absent is not None})  # fmt: skip
        state = f"not here: {absent}" if absent else f"FAILED: {problem}" if problem else "right"
        print(f"{name}, head_dim {dim}, {dtype}: {state}")
    return found


def _measure(
    options: argparse.Namespace,
    device: str,
    size: tuple[str, int, str],
    backends: Sequence[str],
    skipped: list[dict[str, str]],
) -> list[Row]:
    """Time everything at one size, in turn; every call is checked before."""
    tokens, dim, dtype = size
    layout = layout_of(tokens)
    generator = torch.Generator().manual_seed(0)
    shape = (1, options.heads, layout.seq_len, dim)
    host = [torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(3)]
    cases = [("dense", dense(layout, options.heads))] + [
        (pattern, build(pattern, layout, options.heads, density, seed))
        for pattern in options.pattern
        for seed, density in enumerate(options.density)
    ]
    here = [x.to(device) for x in host]
    calls = _dense_calls(here)
    for (pattern, index), name in itertools.product(cases, backends):
        made = _checked(name, pattern, index, host, here)
        if isinstance(made, str):
            what = {"pattern": pattern, "tokens": tokens, "reason": made}
            skipped.append({"backend": name, **what})
        else:
            calls.append(made)
    runs = {number: call.run for number, call in enumerate(calls)}
    with torch.no_grad():
        times = interleaved(runs, clock="wall", rounds=options.rounds, device=torch.device(device))
    best = min((n for n, c in enumerate(calls) if c.name in dense_kernels.CANDIDATES and c.error is not None),
               key=lambda number: times[number].seconds)  # fmt: skip
    return [
        _row(call, times[number], calls[best].name, times[best].seconds, shape, dtype)
        for number, call in enumerate(calls)
    ]


def _dense_calls(tensors: list[Tensor]) -> list[_Call]:
    """Dense kernels that are right here; SageAttention, which rounds to 8 bits, is no baseline."""
    q = tensors[0]
    scale = q.shape[-1] ** -0.5
    right = dense_kernels.measured(*tensors, scale)
    runs = dense_kernels.candidates(q)
    calls = [
        _Call(name, "dense", 1.0, 0.0, lambda run=runs[name]: run(*tensors, scale))
        for name in right
    ]
    if q.is_cuda and importlib.util.find_spec("sageattention") is not None:
        from sageattention import sageattn

        calls.append(_Call("sage (8 bit)", "dense", 1.0, None, lambda: sageattn(*tensors)))
    return calls


def _checked(
    name: str, pattern: str, index: SparseIndex, host: list[Tensor], here: list[Tensor]
) -> _Call | str:
    """A call whose result is right; or why there is none."""
    moved = index.to(here[0].device)
    if reason := BACKENDS[name].unsupported(here[0], moved):
        return reason

    def run() -> Tensor:
        return attend(*here, moved, backend=name).out

    try:
        with torch.no_grad():
            error = check(f"backend {name!r} ({pattern})", run().cpu(), *host, index)
    except WrongResult as wrong:
        return str(wrong)
    return _Call(name, pattern, index.density, error, run)


def _row(
    call: _Call, timing: Timing, kernel: str, best: float, shape: tuple[int, ...], dtype: str
) -> Row:
    _, heads, tokens, dim = shape
    speedup = best / timing.seconds
    return Row(
        call.name, call.pattern, tokens, dim, heads, dtype, call.density, timing.seconds,
        timing.spread, call.error, kernel, best, speedup, speedup * call.density,
    )  # fmt: skip


def _forecast(rows: list[Row], slots: int) -> list[dict]:
    """Fit each backend's dense calls, write forecasts into its other rows, and say how far off they are."""
    models = []
    kinds = dict.fromkeys((row.backend, row.head_dim, row.dtype) for row in rows)
    for kind in kinds:
        mine = [row for row in rows if (row.backend, row.head_dim, row.dtype) == kind]
        calls = [(r.tokens, r.heads, r.seconds) for r in mine if r.pattern == "dense"]
        sparse = [row for row in mine if row.pattern != "dense"]
        if not calls or not sparse:
            continue
        model = fit(calls, slots, BLOCK_Q, BLOCK_K)
        for row in sparse:
            row.forecast_seconds = model.uniform(row.tokens, row.heads, row.density)
        off = [abs(r.forecast_seconds / r.seconds - 1) for r in sparse if r.forecast_seconds]
        models.append({"backend": kind[0], "head_dim": kind[1], "dtype": kind[2],
                       **dataclasses.asdict(model), "mean_error": sum(off) / len(off),
                       "worst_error": max(off)})  # fmt: skip
    return models


def _slots(device: str) -> int:
    if device == "cpu":
        return torch.get_num_threads()
    return torch.cuda.get_device_properties(0).multi_processor_count


def _print(rows: list[Row], models: list[dict]) -> None:
    for r in rows:
        print(
            f"{r.backend:18} {r.pattern:8} {r.tokens:6} x {r.head_dim:3} {r.dtype:8} "
            f"density {r.density:6.1%} {1e3 * r.seconds:9.3f} ms  {r.speedup:6.2f}x of {r.dense_kernel}"
        )
    for m in models:
        print(f"forecast of {m['backend']}, head_dim {m['head_dim']}, {m['dtype']}: off by "
              f"{m['mean_error']:.0%} in the mean, {m['worst_error']:.0%} at worst")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
