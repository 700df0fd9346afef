"""Time whole denoising steps on a GPU, dense, sparse, compiled and with a step cache, beside the forecast.

    python -m benchmarks.wan_step --json steps.json     # Wan 2.1 1.3B and 14B, HunyuanVideo, MiniMax-H3
    python -m benchmarks.wan_step --case wan-14b-720p --layers 4 --json 14b.json
    python -m benchmarks.wan_step --dry                  # tiny, on the CPU: says nothing of speed

Each step runs as it comes and compiled block by block. What sparse attention is worth is told against the
dense step that runs the same way. Weights are random: a step takes as long as with real ones, and what it
computes means nothing. So this says what a density is worth in seconds, not which density a video can bear.

With `--layers` fewer blocks are measured, and half as many; what a block takes more times all of the model's
blocks is said as the step's time. The file is written after each row: a run that is stopped keeps its rows.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import sparse_dit
from benchmarks.step_models import CASES, DRY, Case, call_of, made, shortened
from sparse_dit.bench.measure import interleaved
from sparse_dit.doctor import packages
from sparse_dit.environment import environment
from sparse_dit.integrations import heads_of
from sparse_dit.integrations.step_caches import disable_step_cache, enable_step_cache
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern
from sparse_dit.plan import ComponentPlan, HeadChoice, Plan, Stage
from sparse_dit.search.cost import CostTable, measure_cost, nearest_tiles
from sparse_dit.step_cache import TAYLORSEER, StepCache
from sparse_dit.token_order import MODEL, PLAN
from sparse_dit.whole_file import whole_file

HEAD_DIM = 128
CACHE = StepCache(TAYLORSEER, {"interval": 2, "first": 2})
STEPS = 10  # of a generation with a step cache


@dataclass
class Row:
    """One way to run a step; times are medians of seconds.

    Args:
        name: What ran.
        density: The density of attention in all layers.
        compiled, cache: Whether blocks were compiled; the step cache, whose steps are of one generation.
        seconds, spread: Time of a step of all blocks, and its samples' quartile distance over it.
        measured: Blocks that were timed, and seconds, of each run that `seconds` is reckoned from.
        speedup: Against the dense step that ran the same way, without a cache.
        forecast: What the cost table gives for `speedup`; None for what needs none.
        backends: The backends that ran.
    """

    name: str
    density: float
    compiled: bool
    cache: str | None
    seconds: float
    spread: float
    measured: list[tuple[dict[str, int], float]]
    speedup: float
    forecast: float | None
    backends: list[str]


@dataclass
class Way:
    """How a step is run."""

    pattern: Pattern | None
    compiled: bool = False
    cache: bool = False
    order: str = MODEL

    @property
    def name(self) -> str:
        """For the report."""
        if self.pattern is None:
            return "stock"
        if self.pattern.is_dense:
            return "a dense plan"
        once = "" if self.order == MODEL else ", tokens sorted once"
        return f"nearest tiles {self.pattern.tile}, far field{once}"


@dataclass
class Bench:
    """A case that is measured on a device."""

    case: Case
    device: str
    dtype: torch.dtype
    options: argparse.Namespace
    counts: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        most = self.options.layers or max(self.case.blocks.values())
        self.counts = {name: min(n, most) for name, n in self.case.blocks.items()}
        self.transformer = made(self.case, self.counts, self.device, self.dtype)
        self.call = call_of(self.case, self.transformer, self.device, self.dtype)

    def rows(self, table: CostTable) -> Iterator[Row]:
        """Stock and a dense plan, which must agree; then each density, as it comes and compiled; caches."""
        dense = [Way(None), Way(Pattern(Dense())), Way(None, compiled=True), Way(None, cache=True)]
        sparse = [
            Way(nearest_tiles(self.case.layout, density, True), *how)
            for density in self.options.density
            for how in ((False, False), (True, False), (True, False, PLAN), (False, True))
        ]
        want, stock = self.call(), {}
        for way in (*dense, *sparse):
            row = self._row(way, table, stock, want)
            if way.pattern is None and not way.cache:
                stock[way.compiled] = row.seconds
            yield row

    def _row(self, way: Way, table: CostTable, stock: dict[bool, float], want: torch.Tensor) -> Row:
        density, backends = 1.0, []
        measured: list[tuple[dict[str, int], float]] = []
        spread = 0.0
        for counts in self._sizes():
            with contextlib.ExitStack() as stack:
                for name, count in counts.items():
                    stack.enter_context(shortened(self.transformer, name, count))
                handle = None
                if way.pattern is not None:
                    plan = plan_of(self.transformer, self.case.layout, way.pattern)
                    handle = stack.enter_context(
                        sparse_dit.patch(self.transformer, plan, token_order=way.order)
                    )
                if way.compiled:
                    stack.enter_context(compiled(self.transformer, self.device))
                out = self.call()
                same = counts != self.counts or torch.equal(out, want)
                if way.pattern is not None and way.pattern.is_dense and not same:
                    raise AssertionError("a dense plan must compute what stock does, bit for bit")
                run = self._generation(stack) if way.cache else self.call
                timing = interleaved({"run": run}, clock="wall", rounds=self.options.rounds)["run"]
                measured.append((counts, timing.seconds / (STEPS if way.cache else 1)))
                if counts == self.counts:
                    spread = timing.spread
                    if handle is not None:
                        density = handle.summary().density
                        ran = (entry for entries in handle.ran.values() for entry in entries)
                        backends = sorted({entry.backend or "stock" for entry in ran})
        seconds = whole(measured, self.case.blocks)
        dense = stock.get(way.compiled, seconds)
        forecast = None
        if way.pattern is not None and not way.pattern.is_dense and not way.cache:
            heads = heads_of(self.transformer)
            assert len(heads) == sum(self.counts.values()), (
                "each block has one self-attention layer"
            )
            calls = sum(self.case.blocks.values()) * next(iter(heads.values()))[0]
            saved = calls * (table.dense - table.seconds(way.pattern, density))
            forecast = dense / (dense - saved)
        return Row(
            way.name, density, way.compiled, str(CACHE) if way.cache else None, seconds, spread,
            measured, dense / seconds, forecast, backends,
        )  # fmt: skip

    def _sizes(self) -> list[dict[str, int]]:
        """Numbers of blocks to measure: all that there are; then with half of each list that is short."""
        short = (name for name, count in self.counts.items() if count < self.case.blocks[name])
        return [self.counts, *({**self.counts, n: self.counts[n] // 2} for n in short)]

    def _generation(self, stack: contextlib.ExitStack) -> Callable[[], None]:
        """The steps of one generation with the step cache, which is off again when `stack` ends."""
        config = enable_step_cache(self.transformer, CACHE)
        stack.callback(disable_step_cache, self.transformer, config)

        def generate() -> None:
            self.transformer._reset_stateful_cache()
            for step in range(STEPS):
                with self.transformer.cache_context("cond"):
                    self.call(1 - step / STEPS)

        return generate


def whole(measured: Sequence[tuple[dict[str, int], float]], blocks: Any) -> float:
    """Seconds of a step of all blocks, from those of some: in proportion to the blocks that differ."""
    counts, seconds = measured[0]
    total = seconds
    for fewer, less in measured[1:]:
        (name,) = (name for name in counts if counts[name] != fewer[name])
        each = (seconds - less) / (counts[name] - fewer[name])
        total += each * (blocks[name] - counts[name])
    return total


@contextlib.contextmanager
def compiled(transformer: Any, device: str) -> Iterator[None]:
    """Inside the block the repeated blocks are compiled; on the CPU they are only traced."""
    torch.compiler.reset()
    transformer.compile_repeated_blocks(backend="inductor" if device == "cuda" else "eager")
    try:
        yield
    finally:
        for module in transformer.modules():
            module._compiled_call_impl = None


def plan_of(transformer: Any, layout: TokenLayout, pattern: Pattern) -> Plan:
    """One pattern for every head of every layer at every noise level."""
    heads = heads_of(transformer)
    component = ComponentPlan(
        model_class=type(transformer).__name__,
        config_hash="0" * 64,
        heads=heads,
        layout=layout,
        stages=(Stage(1.0, 0.0),),
        layers={name: ((HeadChoice(pattern),) * count,) for name, (count, _) in heads.items()},
    )
    return Plan(pipeline_class="", density=0.0, components={"transformer": component})


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; exit code 2 without a GPU."""
    options = _options(arguments)
    if not options.dry and not torch.cuda.is_available():
        print("error: this needs a GPU that torch sees; --dry runs on the CPU", file=sys.stderr)
        return 2
    device, dtype = ("cpu", torch.float32) if options.dry else ("cuda", torch.bfloat16)
    report: dict[str, Any] = {
        "version": 2, "dry": options.dry, "done": False,
        "environment": {**environment(device), **packages()}, "cases": [],
    }  # fmt: skip
    if options.dry:
        print("a dry run: its times are of this CPU and of tiny models, and say nothing of a GPU")
    for name in options.case or (DRY if options.dry else CASES):
        case = (DRY if options.dry else CASES)[name]
        entry: dict[str, Any] = {
            "case": name, "grid": case.layout.grid, "tokens": case.layout.seq_len,
            "blocks": dict(case.blocks), "rows": [],
        }  # fmt: skip
        report["cases"].append(entry)
        try:
            _measure(case, device, dtype, options, entry, lambda: _write(options.json, report))
        except torch.OutOfMemoryError as error:
            entry["error"] = f"{error}; try fewer --layers"
            print(f"{name}: {entry['error']}", file=sys.stderr)
    report["done"] = True
    _write(options.json, report)
    return 0


def _measure(
    case: Case, device: str, dtype: torch.dtype, options: argparse.Namespace,
    entry: dict[str, Any], write: Callable[[], None],
) -> None:  # fmt: skip
    with torch.inference_mode():
        bench = Bench(case, device, dtype, options)
        heads = next(iter(heads_of(bench.transformer).values()))[0]
        table = measure_cost(
            case.layout, heads, HEAD_DIM, device=device, dtype=dtype, budgets=options.density
        )
        entry["cost"] = table.to_dict()
        entry["layers measured"] = bench.counts
        of = ", ".join(f"{n} of {case.blocks[b]} {b}" for b, n in bench.counts.items())
        print(f"{entry['case']}: {case.layout.seq_len} tokens, layers measured: {of}")
        for row in bench.rows(table):
            entry["rows"].append(dataclasses.asdict(row))
            write()
            print(f"  {_line(row)}", flush=True)


def _line(row: Row) -> str:
    how = f"{row.name}{', compiled' if row.compiled else ''}{f', {row.cache}' if row.cache else ''}"
    forecast = ""
    if row.forecast is not None:
        forecast = f"  forecast {row.forecast:.2f}x ({row.forecast / row.speedup - 1:+.0%})"
    return (f"{how:58} density {row.density:6.1%} {1e3 * row.seconds:9.1f} ms {row.speedup:5.2f}x"
            f"{forecast}  {', '.join(row.backends)}")  # fmt: skip


def _write(file: Path | None, report: dict[str, Any]) -> None:
    if file is not None:
        with whole_file(file) as partial:
            partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--case", nargs="+", choices=[*CASES, *DRY], metavar="CASE",
                        help=f"of {', '.join(CASES)}; all by default")  # fmt: skip
    parser.add_argument("--layers", type=int, help="measure so many blocks of each list at most")
    parser.add_argument("--density", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.layers is not None and options.layers < 2:
        parser.error(f"--layers must be at least 2, to tell what one takes, got {options.layers}")
    if wrong := set(options.case or ()) - set(DRY if options.dry else CASES):
        parser.error(f"no {'tiny ' if options.dry else ''}case {', '.join(sorted(wrong))}")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
