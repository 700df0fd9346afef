"""An index in whole blocks, as other packages want it, and what all of them refuse."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...index import SparseIndex
from ...intervals import RowIntervals
from ...on_cpu import on_cpu
from ...rounding import BlockIndex, to_blocks
from ..attended import Attended
from ..flex_lists import full_width
from ..sorting import orders_of, sort_tokens, unsort_tokens

HALF = (torch.float16, torch.bfloat16)
Kernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Contract:
    """The function of another package that a backend calls, as it was read in that package's source.

    Args:
        package: The name of the distribution.
        version: The version that was read.
        file: The file of the distribution that defines it.
        function: The function's name, or `Class.method`.
        parameters: The names of its parameters in their order, without `self`.
    """

    package: str
    version: str
    file: str
    function: str
    parameters: tuple[str, ...]


def absent(package: str) -> str | None:
    """A sentence that says that a distribution isn't installed; None if it is."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"the package {package} isn't installed"
    return None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def not_here(q: Tensor, package: str, head_dims: tuple[int, ...]) -> str | None:
    """Why a package can't run on such tensors here; None if it can.

    It must be installed, and needs an NVIDIA GPU, half precision and one of its head_dims.
    """
    if reason := absent(package):
        return reason
    if not q.is_cuda or torch.version.hip is not None:
        return f"it runs on NVIDIA GPUs, but q is on {q.device}"
    if q.dtype not in HALF:
        return f"it takes float16 and bfloat16, but q is {q.dtype}"
    if q.shape[-1] not in head_dims:
        return f"head_dim must be one of {', '.join(map(str, head_dims))}, got {q.shape[-1]}"
    if torch.compiler.is_compiling():
        return "it can't be traced into a compiled graph"
    return None


def not_whole(index: SparseIndex, block_q: int, block_k: int) -> str | None:
    """Why an index isn't whole blocks; None if it is."""
    if index.rows is not None:
        return "it has no row intervals (causal order)"
    if any(entry.far is not None for entry in index.entries):
        return "it has no far field"
    partial = sum(len(blocks.partial) for blocks in rounded(index, block_q, block_k))
    if partial:
        return (
            f"it computes whole blocks of {block_q} rows and {block_k} keys, but {partial} of the "
            "index are seen in part; use tiles of that many tokens that divide the grid"
        )
    return None


def rounded(index: SparseIndex, block_q: int, block_k: int) -> list[BlockIndex]:
    """The blocks that each entry of an index computes; kept in the entry's cache."""
    found = []
    for entry in index.entries:
        key = ("blocks", block_q, block_k)
        if key not in entry.cache:
            entry.cache[key] = to_blocks(entry, block_q, block_k)
        found.append(entry.cache[key])
    return found


@on_cpu
def block_map(index: SparseIndex, block_q: int, block_k: int) -> Tensor:
    """Which blocks each head computes, bool `[H, Qb, Kb]` on the index's device; kept in its cache."""
    key = ("block map", block_q, block_k)
    if key not in index.cache:
        columns = -(-index.num_keys // block_k)
        maps = []
        for blocks in rounded(index, block_q, block_k):
            rows = len(blocks.full_offsets) - 1
            table = torch.zeros(rows, columns, dtype=torch.bool)
            row = torch.repeat_interleave(torch.arange(rows), blocks.full_offsets.diff().long())
            table[row, blocks.full.long()] = True
            maps.append(table)
        index.cache[key] = _by_head(maps, index)
    return index.cache[key]


def block_lists(index: SparseIndex, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block sees, int32 `[H, Qb]`, and which, int32 `[H, Qb, Kb]`.

    The numbers of key blocks rise and are filled up with 0. Both are kept in the index's cache.
    """
    key = ("block lists", block_q, block_k)
    if key not in index.cache:
        columns = -(-index.num_keys // block_k)
        found = rounded(index, block_q, block_k)
        tables = [full_width(blocks.full_offsets, blocks.full, columns) for blocks in found]
        counts = [blocks.full_offsets.diff() for blocks in found]
        index.cache[key] = (_by_head(counts, index), _by_head(tables, index))
    return index.cache[key]


def run(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    rows: RowIntervals | None,
    kernel: Kernel,
) -> Attended:
    """Call a kernel with tokens in the order of each head, `[B, H, N, D]` contiguous, keys by query head.

    Raises:
        NotImplementedError: If rows have intervals.
    """
    if rows is not None:
        raise NotImplementedError(
            f"backend {name!r} cannot run this: it has no row intervals (padding)"
        )
    orders = orders_of(index)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    q, k, v = (
        sort_tokens(x, order).contiguous()
        for x, order in ((q, orders.queries), (k, orders.keys), (v, orders.keys))
    )
    out, lse = kernel(q, k, v)
    if lse is not None:
        lse = unsort_tokens(lse.float(), orders.queries)
    return Attended(unsort_tokens(out.to(q.dtype), orders.queries), lse, None)


def no_mass(name: str) -> NotImplementedError:
    """The error of a backend without block mass."""
    return NotImplementedError(f"backend {name!r} cannot run this: it has no block mass")


def _by_head(tables: list[Tensor], index: SparseIndex) -> Tensor:
    device = index.entries[0].q_offsets.device
    return torch.stack([tables[p] for p in index.head_to_pattern]).contiguous().to(device)
