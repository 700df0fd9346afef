"""A child process of test_cpu_kernel_memory.py: inputs beside memory that must not be touched.

Each input ends at the last byte before a page without access, or starts at the first byte after one, so
one step too far ends the process. Run as `python -m tests.helpers.guard_pages VARIANT`; says what it runs.
With "overstep" for a variant it takes such a step, to show that it would be noticed.
"""

import ctypes
import itertools
import mmap
import sys

import torch

from sparse_dit.backends.cpu import library
from sparse_dit.backends.cpu.packed import packed_index
from sparse_dit.index import SparseIndex
from tests.helpers.kernel_cases import DTYPES, dense, entry, in_order, qkv, split, until

LIBC = ctypes.CDLL(None, use_errno=True)
PROT_NONE = 0


def guarded(x: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy of a contiguous tensor that touches a page without access."""
    size = x.numel() * x.element_size()
    pages = -(-size // mmap.PAGESIZE) + 2
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = (pages - 1) * mmap.PAGESIZE - size if at_end else mmap.PAGESIZE
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
    copy.copy_(x)
    for page in (0, pages - 1):
        where = ctypes.c_void_p(start + page * mmap.PAGESIZE)
        if LIBC.mprotect(where, ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    return copy


def cases() -> dict[str, SparseIndex]:
    """Indices that reach the first and the last token in different ways."""
    n, m = 77, 131
    groups = split(n, 16)
    cells = [0, 7, 64, 100, m]
    ends = [[0, m - 1], range(m), [*range(0, m, 2)], range(m - 1, m), range(40, m)]
    parts = {
        "dense": dense(n, m),
        "one key": dense(n, 1),
        "sparse": entry(m, groups, ends),
        "far": entry(m, groups, [[]] * 5, cells=cells, pooled=[range(4)] * 5),
        "sorted": entry(m, groups, ends, k_order=torch.arange(m).flip(0)),
    }
    every = {name: SparseIndex((part,), (0, 0)) for name, part in parts.items()}
    return {**every, "causal": in_order(every["dense"], 60)}


def run(index: SparseIndex, dim: int, dtype: torch.dtype, at_end: bool, by_token: bool) -> None:
    """Compares with the same inputs in ordinary memory."""
    inputs = qkv(index, dim, batch=2, kv_heads=1, dtype=dtype)
    own, stop = index.rows, until(index, index.num_keys, index.num_keys - 1).contiguous()
    stop = stop if own is None else torch.minimum(stop, own.stop)
    start = torch.ones_like(stop)

    def guard(x: torch.Tensor) -> torch.Tensor:
        if by_token:
            return guarded(x.transpose(1, 2).contiguous(), at_end).transpose(1, 2)
        return guarded(x, at_end)

    extra = (dim**-0.5, True, 16, index.max_groups)
    want = torch.ops.sparse_dit.attend_measured(*inputs, packed_index(index), start, stop, *extra)
    ours = torch.ops.sparse_dit.attend_measured(
        *map(guard, inputs),
        *(guarded(x, at_end) for x in (packed_index(index), start, stop)),
        *extra,
    )
    for x, same in zip(ours, want, strict=True):
        assert torch.equal(x, same), "the place in memory makes a difference"


def overstep() -> None:
    """Reads the byte after an input."""
    x = guarded(torch.zeros(5), at_end=True)
    ctypes.string_at(x.data_ptr() + 20, 1)


def main(variant: str) -> None:
    """All cases, each named before it runs."""
    if variant == "overstep":
        overstep()
    assert library.LIBRARY is not None, library.PROBLEM
    library.LIBRARY.use_variant(variant)
    options = itertools.product(DTYPES, (8, 24, 64, 136), (True, False), (True, False))
    for (dtype, dim, at_end, by_token), (name, index) in itertools.product(
        options, cases().items()
    ):
        print(name, dtype, dim, "at the end" if at_end else "at the start", by_token, flush=True)
        run(index, dim, dtype, at_end, by_token)
    print("passed")


if __name__ == "__main__":
    main(sys.argv[1])
