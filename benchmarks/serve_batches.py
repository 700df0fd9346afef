"""Whether two equal jobs in one batch take less time each than one after the other.

    python benchmarks/serve_batches.py --steps 4

The embedded model with its plan at 4,608 tokens, and dense; pairs in one process, their order by turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from typing import Any

import torch

from sparse_dit.inputs import load_pipeline
from sparse_dit.patch import patch
from sparse_dit.plan import Plan
from sparse_dit.resources import shipped

PROMPTS = ["a red square moves up over gray checks", "a blue circle moves left over red stripes"]


def main() -> None:
    """Time both, and print the ratio of each pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    pipe = load_pipeline(str(shipped("tiny_wan")), "cpu", "float32")
    pipe.set_progress_bar_config(disable=True)
    plan, said = Plan.from_pretrained("tiny-wan"), {}
    for name in ("sparse", "dense"):
        with patch(pipe, plan) if name == "sparse" else contextlib.nullcontext():
            _one_by_one(pipe, given.steps)
            said[name] = [_pair(pipe, given.steps, bool(n % 2)) for n in range(given.pairs)]
    medians = {name: round(statistics.median(ratios), 3) for name, ratios in said.items()}
    print(json.dumps({"batch over one by one, CPU seconds": said, "median": medians}))


def _pair(pipe: Any, steps: int, batch_first: bool) -> float:
    if batch_first:
        batch = _seconds(_batch, pipe, steps)
        single = _seconds(_one_by_one, pipe, steps)
    else:
        single = _seconds(_one_by_one, pipe, steps)
        batch = _seconds(_batch, pipe, steps)
    return round(batch / single, 3)


def _seconds(run: Any, pipe: Any, steps: int) -> float:
    began = time.process_time()
    run(pipe, steps)
    return time.process_time() - began


def _one_by_one(pipe: Any, steps: int) -> None:
    for prompt in PROMPTS:
        _generate(pipe, [prompt], steps)


def _batch(pipe: Any, steps: int) -> None:
    _generate(pipe, PROMPTS, steps)


def _generate(pipe: Any, prompts: list[str], steps: int) -> None:
    seeds = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
    size = {"height": 192, "width": 192, "num_frames": 15, "max_sequence_length": 32}
    pipe(prompts, num_inference_steps=steps, guidance_scale=3.0, generator=seeds, **size)


if __name__ == "__main__":
    main()
