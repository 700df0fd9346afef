"""Time forwards under a plan with tokens sorted in every layer, and once a forward, in pairs.

    python benchmarks/token_order.py --model demos/tiny_wan/model --plan profiles/tiny-wan/plan.json

The forwards are those of a generation. CPU time on a CPU, the clock on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import sparse_dit
from sparse_dit.demo.run import HELD_OUT, SETTINGS
from sparse_dit.inputs import load_pipeline
from sparse_dit.integrations import workload
from sparse_dit.timing import Timer
from sparse_dit.token_order import MODEL, PLAN, TOKEN_ORDERS


@torch.inference_mode()
def main(arguments: Sequence[str]) -> int:
    """Run the benchmark."""
    options = _options(arguments)
    pipe = load_pipeline(options.model, options.device, None)
    calls = _forwards(
        pipe, replace(SETTINGS, height=options.size, width=options.size, steps=options.steps)
    )
    made = {order: copy.deepcopy(pipe.transformer) for order in TOKEN_ORDERS}
    handles = {o: sparse_dit.patch(made[o], options.plan, token_order=o) for o in TOKEN_ORDERS}
    seconds, drifts = {order: [] for order in TOKEN_ORDERS}, []
    for number in range(-1, options.rounds):  # the first round builds indices
        for handle in handles.values():
            handle.begin_run()
        for place, call in enumerate(calls):
            out = {}
            for order in TOKEN_ORDERS[:: 1 if (number + place) % 2 else -1]:
                timer = Timer(pipe.device)
                out[order] = made[order](**call)[0]
                taken = timer.stop()
                seconds[order] += [taken.seconds] if number >= 0 else []
            drifts.append(((out[PLAN] - out[MODEL]).norm() / out[MODEL].norm()).item())
    ratios = [p / m for p, m in zip(seconds[PLAN], seconds[MODEL], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    for order, taken in seconds.items():
        density = handles[order].summary().density
        print(f"{order:6} {statistics.fmean(taken):8.4f} s a forward, density {density:.3f}")
    print(f"{len(ratios)} pairs: {sum(seconds[PLAN]) / sum(seconds[MODEL]):.4f} of the time, "
          f"median {middle:.4f}, quartiles {low:.4f} and {high:.4f}")  # fmt: skip
    print(f"largest relative difference of an output: {max(drifts):.1e}")
    print(*(note for note in handles[PLAN].summary().notes if "tokens" in note), sep="\n")
    return 0


def _forwards(pipe: Any, settings: Any) -> list[dict[str, Any]]:
    """The arguments of every forward of a generation."""
    found = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs), with_kwargs=True
    )
    work: Any = workload(pipe, settings)
    work.run(HELD_OUT[0])
    hook.remove()
    return [{**call, "return_dict": False} for call in found]


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="demos/tiny_wan/model")
    parser.add_argument("--plan", default="tiny-wan")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=SETTINGS.height, help="height and width")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
