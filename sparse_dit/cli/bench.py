"""`sparse-dit bench`: the commands, their options, and what they print."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..outputs import Outputs
from ..tables import out

if TYPE_CHECKING:
    from ..bench.kernel import Conditions
    from ..bench.results import Results
    from ..bench.sweep import Sweep

app = typer.Typer(
    help="Measure this machine: how fast sparse attention is.",
    add_completion=False,
    no_args_is_help=True,
)
err = Console(stderr=True)


@app.callback()
def _common() -> None:
    """A callback that does nothing: with it a single command keeps its name."""


@app.command()
def kernel(
    quick: Annotated[
        bool, typer.Option("--quick", help="The main figures at 8,192 tokens, in a minute.")
    ] = False,
    tokens: Annotated[
        list[str] | None, typer.Option(help="8192, or 8x30x52 frames, rows, columns; repeatable.")
    ] = None,
    head_dim: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable.")] = None,
    density: Annotated[
        list[float] | None, typer.Option(help="Share of the pairs; repeatable.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16, float16; repeatable.")
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(help="blocks, far, columns, diagonals, tiles; repeatable."),
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Name of a backend; repeatable.")
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Default 2; --quick has 1.")] = None,
    flex: Annotated[bool, typer.Option(help="Compare with compiled FlexAttention too.")] = True,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: CPU time of one thread, for busy machines.")
    ] = "wall",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: torch's own.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that all calls take turns.")] = 9,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="PNG file to write.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> int:
    """Attention backends against SDPA and compiled FlexAttention with the same lists."""
    outputs = Outputs(replace=force, say=_say)
    for option, path, ending in (("--json", json_file, ".json"), ("--plot", plot_file, ".png")):
        if path is not None:
            outputs.expect(option, path, ending)
    varied = {
        "--tokens": tokens, "--head-dim": head_dim, "--density": density, "--dtype": dtype,
        "--pattern": pattern, "--heads": heads,
    }  # fmt: skip
    given = [name for name, value in varied.items() if value]
    if quick and given:
        raise ValueError(f"--quick has its own sizes: leave out {', '.join(given)}")
    conditions = _conditions(clock, threads, rounds, flex)
    names = _backends(backend, quick)
    from ..bench.sweep import Sweep

    sweep = None
    if not quick:
        sweep = Sweep.of(
            tokens or ["8192"], head_dim or [64, 128], density or [0.25, 0.125, 0.0625, 0.03],
            dtype or ["float32"], pattern or ["blocks", "far", "columns"], heads or 2,
        )  # fmt: skip
    if plot_file is not None:
        from ..bench import plot  # noqa: F401 - a missing matplotlib shows before the measurement
    results = _measured(sweep, names, conditions)
    _print(results)
    if json_file is not None:
        _say(f"wrote {outputs.write(json_file, results.save)}")
    if plot_file is not None:
        from ..bench.plot import save_plot

        _say(f"wrote {outputs.write(plot_file, lambda path: save_plot(results.rows, path))}")
    return outputs.code


@app.command()
def cost(
    file: Annotated[
        Path | None,
        typer.Option("--out", help="Table to write; default profiles/devices/<this machine>.json."),
    ] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(help="1152,4608,9216 or 8x24x24 frames, rows, columns; repeatable."),
    ] = None,
    head_dim: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16, float16; repeatable.")
    ] = None,
    density: Annotated[
        list[float] | None, typer.Option(help="Share of the pairs; repeatable.")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Of a call; times are of one head.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda.")] = "cpu",
    backend: Annotated[str, typer.Option(help="Name of a backend.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: torch's own.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> int:
    """What heads cost on this machine, as a table that plans can be searched with anywhere."""
    import torch

    from ..bench.cost import CostSweep, cost_table, measure_device
    from ..bench.measure import num_threads
    from ..bench.results import load_notes
    from ..inputs import check_device
    from ..search.cost import BUDGETS
    from ..search.device_table import slug

    check_device(device)
    sweep = CostSweep(
        CostSweep.sizes(tokens or ["1152,4608,9216"]), tuple(head_dim or [64]),
        tuple(dtype or ["float32"]), tuple(sorted(density or BUDGETS)), heads, device, backend,
        threads or torch.get_num_threads(),
    )  # fmt: skip
    with num_threads(sweep.threads):
        name = slug(device.split(":")[0])
    file = file or Path("profiles", "devices", f"{name}.json")
    outputs = Outputs(replace=force, say=_say)
    outputs.expect("--out", file, ".json")
    table = measure_device(sweep, _say)
    out.print(cost_table(table))
    for note in load_notes(table.foreign_cores, "stop them"):
        out.print(note, markup=False, highlight=False, soft_wrap=True)
    _say(f"wrote {outputs.write(file, table.save)}")
    return outputs.code


@app.command()
def seam(
    tokens: Annotated[int, typer.Option(min=1, help="Of the attention to compare with.")] = 4096,
    heads: Annotated[int, typer.Option(min=1, help="Of the attention to compare with.")] = 2,
    head_dim: Annotated[int, typer.Option(min=1, help="Of the attention to compare with.")] = 64,
) -> None:
    """What a patch with a dense plan adds to an attention call, and whether it copies anything."""
    from ..bench.measure import num_threads
    from ..bench.seam import measure_seam

    with num_threads(1):
        cost = measure_seam(tokens, heads, head_dim)
    out.print(
        f"the seam adds {1e6 * cost.call:.1f} us to an attention call, {100 * cost.share:.3f} % of "
        f"{tokens} tokens, {heads} heads of {head_dim} ({1e3 * cost.attention:.1f} ms on one thread); "
        f"{1e6 * cost.forward:.1f} us to a forward of 30 layers; {cost.copies} copies of q, k and v",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


@app.command()
def host(
    heads: Annotated[int, typer.Option(min=1, help="Of the call.")] = 12,
    head_dim: Annotated[int, typer.Option(min=16, help="Of the call.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Times that all calls take turns.")] = 9,
) -> None:
    """What a call of the Triton backend takes in Python, with launches that do nothing."""
    from ..bench.host import measure_host
    from ..bench.measure import num_threads

    with num_threads(1):
        costs = measure_host(heads, head_dim, rounds)
    for cost in costs:
        launches = "1 launch" if cost.launches == 1 else f"{cost.launches} launches"
        out.print(f"{cost.patterns}: {1e6 * cost.call:.1f} us a call, {launches}", highlight=False)
    out.print("of host time, one thread; no GPU and no driver took part", highlight=False)


def _conditions(clock: str, threads: int | None, rounds: int, flex: bool) -> Conditions:
    import torch

    from ..bench.flex import compiled
    from ..bench.kernel import Conditions
    from ..bench.measure import CLOCKS

    if clock not in CLOCKS:
        raise ValueError(f"--clock must be one of {', '.join(CLOCKS)}, got {clock!r}")
    if clock == "cpu" and threads not in (None, 1):
        raise ValueError(f"--clock cpu times one thread: leave out --threads, got {threads}")
    count = 1 if clock == "cpu" else threads or torch.get_num_threads()
    return Conditions(clock, count, rounds, compiled if flex else None)


def _backends(given: list[str] | None, quick: bool) -> list[str]:
    """Names of backends; by default those that run unasked, in the quick run the first that can."""
    from ..attention import AUTO, AUTO_DEVICES, BACKENDS

    if unknown := [name for name in given or [] if name not in BACKENDS]:
        raise ValueError(f"--backend must be one of {', '.join(BACKENDS)}, got {unknown[0]!r}")
    if given:
        return list(dict.fromkeys(given))
    if quick:
        return [_first_that_can(AUTO)]
    return [name for name in AUTO if name not in AUTO_DEVICES]


def _first_that_can(names: Sequence[str]) -> str:
    """The backend that attention takes here, and why not one before it."""
    import torch

    from ..attention import BACKENDS
    from ..bench.lists import dense, layout_of

    index, q = dense(layout_of("64"), 1), torch.zeros(1, 1, 64, 64)
    for name in names:
        reason = BACKENDS[name].unsupported(q, index)
        if reason is None:
            return name
        _say(f"not measured: backend {name!r}: {reason}")
    raise NotImplementedError(f"one of the backends {', '.join(names)} must run here, none does")


def _variant(backends: Sequence[str]) -> str | None:
    """Name of the native kernel's variant that ran."""
    from ..backends.cpu.library import LIBRARY

    return LIBRARY.running if LIBRARY is not None and "cpu" in backends else None


def _measured(sweep: Sweep | None, backends: Sequence[str], conditions: Conditions) -> Results:
    from ..bench.measure import Load, num_threads
    from ..bench.quick import run_quick, table
    from ..bench.results import Results
    from ..bench.sweep import run_sweep
    from ..environment import environment

    with num_threads(conditions.threads):
        if sweep is None:
            rows, skipped = run_quick(backends, conditions, _say)
        else:
            rows, skipped = run_sweep(sweep, backends, conditions, _say)
    if not rows:
        reasons = dict.fromkeys(f"{s.backend}: {s.reason}" for s in skipped)
        raise NotImplementedError(f"nothing could be measured: {'; '.join(reasons)}")
    load = sum(conditions.loads, Load())
    return Results(
        command="sparse-dit " + " ".join(sys.argv[1:]),
        environment=environment(),
        variant=_variant(backends),
        clock=conditions.clock,
        threads=conditions.threads,
        foreign_cores=load.foreign_cores,
        load_averages=load.averages,
        rows=rows,
        skipped=skipped,
        quick=table(rows) if sweep is None else [],
    )


def _print(results: Results) -> None:
    from ..bench.results import quick_tables, rows_table

    for table in quick_tables(results.quick) if results.quick else [rows_table(results.rows)]:
        out.print(table)
    for note in results.notes():
        out.print(note, markup=False, highlight=False, soft_wrap=True)


def _say(text: str) -> None:
    err.print(text, markup=False, highlight=False, soft_wrap=True)
