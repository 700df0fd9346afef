"""An index in whole blocks, as other packages want it, and what all of them refuse."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...index import SparseIndex
from ...intervals import RowIntervals
from ...on_cpu import on_cpu
from ..attended import Attended
from ..sorting import orders_of, sort_tokens, unsort_tokens
from .blocks import kept, rounded, stands_for_the_rest

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


def not_whole(
    index: SparseIndex, sizes: Sequence[tuple[int, int]], *, far: bool = False
) -> str | None:
    """Why an index isn't whole blocks of any of these sizes; None if it is.

    Args:
        index: The index of one layer.
        sizes: Rows and keys of the blocks that a kernel has, the preferred ones first.
        far: Whether the kernel adds a pooled key for every block that it doesn't compute.
    """
    if fit(index, sizes, far=far) is not None:
        return None
    return _part(index, *sizes[0], far)


def fit(
    index: SparseIndex, sizes: Sequence[tuple[int, int]], *, far: bool = False
) -> tuple[int, int] | None:
    """The first of these sizes of blocks in which an index is whole; None if there is none."""
    return next((size for size in sizes if _part(index, *size, far) is None), None)


def _part(index: SparseIndex, block_q: int, block_k: int, far: bool) -> str | None:
    """What of an index isn't whole blocks of one size; None if all is."""
    if index.rows is not None:
        return "it has no row intervals (causal order)"
    pooled = [entry for entry in index.entries if entry.far is not None]
    if pooled and not far:
        return "it has no far field"
    partial = sum(len(blocks.partial) for blocks in rounded(index, block_q, block_k))
    if partial:
        return (
            f"it computes whole blocks of {block_q} rows and {block_k} keys, but {partial} of the "
            "index are seen in part; use tiles of that many tokens that divide the grid"
        )
    if not all(stands_for_the_rest(entry, block_q, block_k) for entry in pooled):
        return (
            f"it pools blocks of {block_k} keys, all that a block of {block_q} rows doesn't see, but "
            "the index pools others; use cells of that many tokens that divide the grid"
        )
    return None


def share_keys(index: SparseIndex, key_heads: int, *, blocks: bool = False) -> bool:
    """Whether heads with the same keys have them in one order; with `blocks`, see the same of them too."""

    def make() -> bool:
        groups = torch.tensor(index.head_to_pattern).view(key_heads, -1)
        if bool((groups == groups[:, :1]).all()):
            return True
        order = orders_of(index).keys
        if order is None or blocks:
            return not blocks
        apart = order.unflatten(0, (key_heads, -1))
        return bool((apart == apart[:, :1]).all())

    return kept(index, ("share keys", key_heads, blocks), on_cpu(make))


def run(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    rows: RowIntervals | None,
    kernel: Kernel,
    *,
    shared: bool,
) -> Attended:
    """Call a kernel with tokens in the order of each head.

    Where no head has an order and keys needn't be repeated, it gets q, k and v themselves.

    Args:
        name: The backend's name.
        q, k, v, index, rows: As of a backend's `forward`.
        kernel: Takes q `[B, H, N, D]` and keys and values of H heads, or of fewer, with any strides.
        shared: Whether it takes the fewer heads that keys have, in the one order of the heads that share
            them; see `share_keys`.

    Raises:
        NotImplementedError: If rows have intervals.
    """
    if rows is not None:
        raise NotImplementedError(
            f"backend {name!r} cannot run this: it has no row intervals (padding)"
        )
    orders, ratio = orders_of(index), q.shape[1] // k.shape[1]
    key_order = orders.keys
    if ratio > 1 and not shared:
        k, v = (x.repeat_interleave(ratio, 1) for x in (k, v))
    elif key_order is not None:
        key_order = key_order[::ratio]
    out, lse = kernel(
        sort_tokens(q, orders.queries), sort_tokens(k, key_order), sort_tokens(v, key_order)
    )
    if lse is not None:
        lse = unsort_tokens(lse.float(), orders.queries)
    return Attended(unsort_tokens(out.to(q.dtype), orders.queries), lse, None)


def no_mass(name: str) -> NotImplementedError:
    """The error of a backend without block mass."""
    return NotImplementedError(f"backend {name!r} cannot run this: it has no block mass")
