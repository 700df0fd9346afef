"""The Triton kernels' PTX for sm_80, run in an emulator: cases, and a sweep that says what it found.

`python -m tests.gpu_without_gpu.triton_emulated` runs every case for every dtype and head_dim, and
`--mutations N` runs N random changes of the PTX too, of which the checks must catch most.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_dit.attention import attend
from sparse_dit.backends.triton import launch
from sparse_dit.backends.triton.config import configs_for
from sparse_dit.index import SparseIndex, build_index
from sparse_dit.intervals import RowIntervals
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Skip, Stripe, Union, Vertical, Window
from tests.gpu_without_gpu.ptx.device import Change, Emulated, emulated_gpu
from tests.gpu_without_gpu.ptx.mutations import mutant
from tests.gpu_without_gpu.ptx.program import Fault
from tests.helpers.kernel_cases import (
    assert_close,
    assert_close_pooled,
    dense,
    entry,
    in_order,
    one_head,
    qkv,
    truth_of,
    until,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MASS_BLOCK = 16
POOLED = ("far", "cells")  # kinds with a far field
SINKS = Pattern(Union((Window(0, 1, 1), Vertical((1, 3, 3), (4,)))), (2, 2, 2), sink_frames=1)
MIXED = [
    SINKS,
    Pattern(Dense()),
    Pattern(Skip()),
    Pattern(Stripe(space_width=(0, 2)), (None, 2, 4)),
]
FAR = [Pattern(Window(0, 1, 1), (1, 2, 2), far=True), Pattern(Dense()), SINKS, Pattern(Skip())]
RAGGED = TokenLayout.video(2, 7, 9, text_after=5)  # 131 tokens


class Case(NamedTuple):
    """One call.

    Args:
        kind: Name in `INDICES`.
        dtype: Name in `DTYPES`.
        head_dim: Of all heads.
        causal: Whether in causal order.
        padded: Whether keys are padding at the end, other ones in each batch item.
    """

    kind: str
    dtype: str
    head_dim: int
    causal: bool = False
    padded: bool = False

    def __str__(self) -> str:
        flags = [name for name, on in (("causal", self.causal), ("padded", self.padded)) if on]
        return " ".join([self.kind, self.dtype, f"d{self.head_dim}", *flags])


class Made(NamedTuple):
    """What a case is made of, and what must come out.

    Args:
        inputs: q, k and v.
        given: The same as slices of larger tensors of NaN, and with NaN for padding.
    """

    index: SparseIndex
    inputs: list[Tensor]
    given: list[Tensor]
    keywords: dict[str, object]
    truth: tuple


def hand_made(causal: bool) -> SparseIndex:
    """More keys than queries, columns, ragged groups, and groups and heads that see nothing."""
    n, m = 150, 211
    order = torch.randperm(m, generator=torch.Generator().manual_seed(0))
    columns = entry(m, [128, 22], [range(3, m, 7), range(0, m, 2)], k_order=order)
    holes = entry(m, [10, 100, 40], [[], range(5, 170), [210]])
    everything = (columns, holes, entry(m, [128, 22], [[], []]), dense(n, m, 30))
    index = SparseIndex(everything, (0, 1, 2, 3))
    return in_order(index, 61) if causal else index


def tiles_of_128(causal: bool) -> SparseIndex:
    """One group of all rows, which larger tiles suit, and more steps than are fetched ahead."""
    index = one_head(dense(256, 500), 2)
    return in_order(index, 244) if causal else index


def cells(causal: bool) -> SparseIndex:
    """Pooled keys: cells of no token, and of more than a step of `pool`; more than a step of cells."""
    n, m = 150, 211
    order = torch.randperm(m, generator=torch.Generator().manual_seed(1))
    few, many = [0, 40, 47, 47, 120, 121, 190, 211], range(0, 211, 3)
    shuffled = entry(
        m, [60, 40, 50], [[], range(16), [7]], k_order=order, cells=few,
        pooled=[range(7), range(1, 7), []],
    )  # fmt: skip
    ordered = entry(
        m, [64, 64, 22], [range(9), [], []], cells=many, pooled=[range(3, 70), range(70), [0, 69]]
    )
    index = SparseIndex((shuffled, ordered, dense(n, m)), (0, 1, 2, 1))
    return in_order(index, 61) if causal else index


def built(patterns: list[Pattern], causal: bool) -> SparseIndex:
    """Patterns over a ragged layout."""
    index = build_index(patterns, RAGGED)
    return in_order(index) if causal else index


INDICES = {
    "mixed": functools.partial(built, MIXED),
    "far": functools.partial(built, FAR),
    "lists": hand_made,
    "cells": cells,
    "large": tiles_of_128,
}


@functools.cache
def made(case: Case) -> Made:
    """Index, inputs with two key heads, and truth of a case."""
    index, dtype = INDICES[case.kind](case.causal), DTYPES[case.dtype]
    size = 0.5 if case.kind in POOLED else 1.5
    inputs = qkv(index, case.head_dim, batch=2, kv_heads=2, dtype=dtype, size=size)
    given = [within_others(x) for x in inputs]
    keywords: dict[str, object] = {}
    if case.padded:
        keywords["row_stop"] = until(index, index.num_keys, index.num_keys - 90)
        for x in given[1:]:
            x[1, :, index.num_keys - 90 :] = torch.nan
    if case.kind not in POOLED:
        keywords["mass_block"] = MASS_BLOCK
    return Made(index, inputs, given, keywords, truth_of(*inputs, index, **keywords))


def within_others(x: Tensor) -> Tensor:
    """The same numbers in a larger tensor of NaN: a neighbouring row belongs to nobody."""
    around = torch.full([*x.shape[:2], x.shape[2] + 8, x.shape[3] + 8], torch.nan, dtype=x.dtype)
    inner = around[:, :, 4:-4, 8:]
    return inner.copy_(x)


def run(case: Case, change: Change | None = None) -> tuple[float, Emulated]:
    """Run a case, perhaps with other PTX; the largest error over its bound, and what ran.

    Raises:
        Fault: If a kernel does what it must not.
        AssertionError: If a number is wrong.
    """
    index, inputs, given, keywords, truth = made(case)
    with emulated_gpu(change) as gpu:
        ours = attend(*given, index, backend="triton", return_lse=True, **keywords)
        if case.kind in POOLED:
            assert_pooled(case)
    if case.kind in POOLED:
        return assert_close_pooled(ours, inputs, index, **keywords), gpu
    close = functools.partial(assert_close, truth=truth, rounds_weights=True)
    return close(ours, inputs, index, **keywords), gpu


def assert_pooled(case: Case, device: torch.device | str = "cpu") -> None:
    """Run `pool` once more, and compare what it makes with means in float64, rounded once."""
    index, inputs, given, keywords, _ = made(case)
    stop = keywords.get("row_stop")
    rows = index.rows if stop is None else RowIntervals(stop=stop)
    if stop is not None and index.rows is not None:
        rows = index.rows.meet(rows)
    work = launch.work_of(index.to(device), 2, *configs_for("sm80", case.head_dim))
    there = [x.to(device) for x in given]
    on_device = None if rows is None else rows.to(device)
    pooled, cells = launch.pool(launch.call_of(*there, index, on_device, 1.0), work)
    k, v = pooled.cpu()
    bias, first, last = cells.cpu()
    bias = bias.view(torch.float32)
    valid = (
        torch.tensor([[0, index.num_keys]])
        if rows is None
        else rows.valid(index.num_keys, index.num_queries)
    )
    valid = valid.expand(2, 2).tolist()
    info, row, heads = torch.finfo(k.dtype), 0, index.num_heads
    pairs = [(p, head * 2 // heads) for head, p in enumerate(index.head_to_pattern)]
    for p, kv_head in dict.fromkeys(pairs):
        e = index.entries[p]
        bounds = [] if e.far is None else [0, *e.far.cell_offsets.tolist()]  # first a cell of none
        sides = enumerate(itertools.pairwise(bounds), row)
        for (number, (start, stop)), b in itertools.product(sides, range(2)):
            tokens = e.key_tokens[start:stop].long()
            tokens = tokens[(valid[b][0] <= tokens) & (tokens < valid[b][1])]
            place = b, number
            for ours, x in ((k, inputs[1]), (v, inputs[2])):
                mean = x[b, kv_head, tokens].double().sum(0) / max(1, len(tokens))
                wrong = (ours[place].double() - mean).abs()
                assert (wrong <= info.eps / 2 * mean.abs() + 1e-5).all(), "mean of a cell"
            size = torch.tensor(float(len(tokens))).log2()
            assert torch.equal(bias[place], size) or (bias[place] - size).abs() < 1e-6, "its size"
            assert first[place] == min([2**31 - 1, *tokens.tolist()]), "its first token"
            assert last[place] == max([-1, *tokens.tolist()]), "its last token"
        row += max(0, len(bounds) - 1)
    assert row == work.pooled_rows


def every(kinds: Iterable[str]) -> list[Case]:
    """All dtypes and head_dims, with and without causal order and padding."""
    switches = (False, True)
    axes = (kinds, DTYPES, (64, 80, 96, 128, 40), switches, switches)
    return [Case(*x) for x in itertools.product(*axes)]


def swept(cases: list[Case]) -> int:
    """Run cases and say what they came to; how many failed."""
    failed = blocks = executed = 0
    seconds, worst, begun = 0.0, 0.0, time.perf_counter()
    for case in cases:
        try:
            error, gpu = run(case)
        except (Fault, AssertionError) as problem:
            failed += 1
            print(case, f"FAILED: {problem}", sep=" | ", flush=True)
            continue
        count = sum(sum(done.values()) for done in gpu.done.values())
        print(case, f"{error:.2f} of the bound | {gpu.blocks} blocks | {count} instructions "
              f"| {gpu.seconds:.2f} s", sep=" | ", flush=True)  # fmt: skip
        blocks, executed = blocks + gpu.blocks, executed + count
        seconds, worst = seconds + gpu.seconds, max(worst, error)
    print(f"{len(cases)} cases, {failed} failed; largest error {worst:.2f} of its bound; {blocks} "
          f"blocks, {executed} instructions of a block, {seconds:.0f} s emulated, "
          f"{time.perf_counter() - begun:.0f} s in all")  # fmt: skip
    return failed


MUTATED = [
    (Case("mixed", "bf16", 64), "attend"),
    (Case("large", "bf16", 64), "attend"),
    (Case("lists", "fp16", 128, causal=True, padded=True), "attend"),
    (Case("cells", "bf16", 64, causal=True), "attend"),
    (Case("cells", "bf16", 64, padded=True), "pool"),
    (Case("lists", "fp16", 128, causal=True, padded=True), "mass"),
]


def mutated(count: int, seed: int) -> None:
    """Run random mutants, in turn of each kernel of `MUTATED`, and say what caught them."""
    found: dict[str, Counter[str]] = {}
    for number in range(count):
        case, kernel = MUTATED[number % len(MUTATED)]
        kind, line, caught = fate(case, kernel, seed + number)
        found.setdefault(kind, Counter())[caught] += 1
        print(number, case, kernel, kind, line, caught, sep=" | ", flush=True)
    total = sum(found.values(), Counter())
    for kind, fates in sorted(found.items()):
        print(f"{kind}: {dict(fates.most_common())}")
    caught = total.total() - total["survived"]
    print(f"{caught} of {total.total()} caught ({caught / total.total():.0%}): "
          f"{dict(total.most_common())}")  # fmt: skip


def fate(case: Case, kernel: str, seed: int) -> tuple[str, str, str]:
    """A mutant's kind and line, and what caught it; `survived` if nothing did."""
    lines = executed_lines(case, kernel)
    said = []

    def change(name: str, text: str) -> str:
        if name != kernel:
            return text
        text, *rest = mutant(text, lines, seed)
        said.extend(rest)
        return text

    try:
        run(case, change)
        caught = "survived"
    except Fault as fault:
        caught = str(fault).split(":")[0]
    except AssertionError:
        caught = "numbers"
    return said[0], said[1], caught


@functools.cache
def executed_lines(case: Case, kernel: str) -> tuple[int, ...]:
    """Numbers of the lines that a case executes in a kernel."""
    _, gpu = run(case)
    (found,) = [x for x in gpu.done if x.program.name == kernel]
    return tuple(sorted(found.program.instructions[i].line for i in gpu.done[found]))


def main(arguments: list[str]) -> int:
    """1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"of cases: {', '.join(INDICES)}")
    parser.add_argument("--mutations", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-cases", action="store_true", help="mutations alone")
    options = parser.parse_args(arguments)
    if unknown := set(options.kinds) - INDICES.keys():
        parser.error(f"unknown kinds: {sorted(unknown)}")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what isn't written with NaN
    failed = 0 if options.no_cases else swept(every(options.kinds or INDICES))
    if options.mutations:
        mutated(options.mutations, options.seed)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
