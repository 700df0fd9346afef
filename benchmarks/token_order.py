"""Time generations under a plan with tokens sorted in every layer, and once a forward, in pairs.

    python benchmarks/token_order.py demos/tiny_wan/model profiles/tiny-wan/plan.json

Without arguments it takes the embedded model and its ready plan. CPU time on a CPU, the clock on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sparse_dit
from sparse_dit.demo.run import HELD_OUT, SETTINGS
from sparse_dit.inputs import load_pipeline
from sparse_dit.integrations import workload
from sparse_dit.resources import shipped
from sparse_dit.timing import Taken
from sparse_dit.token_order import MODEL, TOKEN_ORDERS


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark."""
    options = _options(arguments)
    pipe = load_pipeline(options.model, options.device, None)
    settings = replace(SETTINGS, steps=options.steps, height=options.size, width=options.size)
    work: Any = workload(pipe, settings)
    ratios, took = [], {order: [] for order in TOKEN_ORDERS}
    for number in range(options.pairs):
        case = HELD_OUT[number % len(HELD_OUT)]
        orders = TOKEN_ORDERS[:: 1 if number % 2 else -1]
        ran = {order: _run(pipe, work, case, options.plan, order) for order in orders}
        (want, _, _), (got, _, notes) = (ran[order] for order in TOKEN_ORDERS)
        for order, (_, taken, _) in ran.items():
            took[order].append(taken.seconds)
        ratios.append(took[TOKEN_ORDERS[1]][-1] / took[MODEL][-1])
        print(
            f"pair {number + 1}: {ratios[-1]:.4f} of the time; {work.difference(got, want)}; {notes}"
        )
    for order, seconds in took.items():
        print(f"{order:6} {statistics.median(seconds):8.3f} s")
    print(f"once a forward takes {statistics.median(ratios):.4f} of the time in every layer "
          f"({min(ratios):.4f} to {max(ratios):.4f})")  # fmt: skip
    return 0


def _run(pipe: Any, work: Any, case: Any, plan: str, order: str) -> tuple[Any, Taken, list[str]]:
    with sparse_dit.patch(pipe, plan, token_order=order) as handle:
        output, taken = work.run(case)
        notes = [note for note in handle.summary().notes if "tokens" in note]
    return output, taken, notes


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", default=str(shipped("tiny_wan")))
    parser.add_argument("plan", nargs="?", default="tiny-wan")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=SETTINGS.height, help="height and width")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--pairs", type=int, default=4)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
