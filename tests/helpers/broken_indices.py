"""A child process of test_cpu_kernel_memory.py: packed indices with words changed at random.

The kernel must refuse them or compute something of the right shape; inputs lie beside pages without
access, so that a wrong address ends the process.
Run as `python -m tests.helpers.broken_indices VARIANT COUNT`.
"""

import random
import sys

import torch

from sparse_dit.backends.cpu import library
from sparse_dit.backends.cpu.packed import packed_index
from sparse_dit.index import SparseIndex
from tests.helpers.guard_pages import cases, guarded
from tests.helpers.kernel_cases import entry, qkv


def indices() -> list[SparseIndex]:
    """Those of the guard pages, and one with orders and a far field in each entry."""
    n, m = 40, 60
    parts = [
        entry(
            m, [16, 16, 8], [range(5), [1, 3, 5], range(40, 60)],
            q_order=torch.randperm(n), k_order=torch.randperm(m),
            cells=[10, 20, 25, 60], pooled=[[0, 2], [1], [0]],
        )
        for _ in range(2)
    ]  # fmt: skip
    return [*cases().values(), SparseIndex(tuple(parts), (0, 1))]


def broken(words: torch.Tensor, lot: random.Random) -> torch.Tensor:
    """A copy with 1 to 3 words changed, near the front more often; or cut off."""
    words = words.clone()
    if lot.random() < 0.1:
        return words[: lot.randrange(1, len(words))].clone()
    for _ in range(lot.randint(1, 3)):
        at = lot.randrange(min(len(words), lot.choice([8, 40, len(words)])))
        value = words[at].item()
        value = lot.choice(
            [
                value ^ (1 << lot.randrange(31)),
                value + lot.choice([-1, 1]),
                lot.randrange(-2, len(words) + 2),
                lot.randrange(-(1 << 31), 1 << 31),
                lot.choice([-(1 << 31), (1 << 31) - 1]),
            ]
        )
        words[at] = max(-(1 << 31), min((1 << 31) - 1, value))
    return words


def main(variant: str, count: int) -> None:
    """That many broken indices; says how many were refused and taken."""
    assert library.LIBRARY is not None, library.PROBLEM
    library.LIBRARY.use_variant(variant)
    torch.manual_seed(0)
    lot = random.Random(0)
    problems = []
    for index in indices():
        inputs = [guarded(x, at_end=True) for x in qkv(index, 8, kv_heads=1)]
        problems.append((index, inputs, packed_index(index)))
    refused = 0
    for number in range(count):
        index, inputs, words = lot.choice(problems)
        print("broken index", number, flush=True)
        bad = guarded(broken(words, lot), at_end=True) if lot.random() < 0.9 else words[:0]
        try:
            ours = torch.ops.sparse_dit.attend_measured(
                *inputs, bad, None, None, 1.0, True, 16, index.max_groups
            )
        except ValueError as error:
            assert "\n" not in str(error) and str(error)
            refused += 1
        else:
            assert [x.shape for x in ours[:2]] == [inputs[0].shape, inputs[0].shape[:3]]
    print("refused", refused, "taken", count - refused)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
