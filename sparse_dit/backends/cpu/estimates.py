"""Estimates in the kernel's library: sums over sampled rows, a choice by them, and key runs.

They check what the library can't see; the callers are `sparse_dit/estimate/`.
Letters in shapes: B batch, H heads, N query tokens, M key tokens, D channels, L listed heads, R sampled rows,
C bins of 64 offsets, G groups of 64 rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import library
from .library import (
    ABI_VERSION,
    PACK_BLOCKS,
    PACK_CHOICE,
    PACK_MEANS,
    PACK_RUNS,
    PACK_SUMS,
    Library,
)
from .operator import DTYPES

BIN = GROUP = 64


def takes(q: Tensor) -> bool:
    """Whether the library is there and takes such queries."""
    return (
        library.LIBRARY is not None
        and q.dtype in DTYPES
        and q.shape[-1] % 8 == 0 < q.shape[-1] <= 512
    )


def sums(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    start: Tensor,
    stop: Tensor,
    *,
    heads: Sequence[int],
    scale: float,
    local: int = 0,
) -> tuple[Tensor, Tensor]:
    """float32 `[B, L, M]` and `[B, L, C]`: what sampled rows give to each key and each bin of offsets.

    Args:
        q, k: `[B, H, N, D]` and `[B, num_kv_heads, M, D]`, any strides.
        rows, start, stop: int32 `[B, R]`, or `[1, R]` for all items: the rows, and the keys that they see.
        heads: Which heads, ascending.
        scale: Factor of the logits.
        local: Keys less far back of a row's own count for no column.

    Raises:
        ValueError: If the library refuses it.
    """
    batch, num_heads, queries, channels = q.shape
    _, kv_heads, keys, _ = k.shape
    if not q.dtype == k.dtype or not k.is_cpu or k.shape[0] != batch or k.shape[3] != channels:
        raise ValueError(
            f"q and k must fit together, got {q.dtype} {list(q.shape)} and {k.dtype} {list(k.shape)}"
        )
    rows, start, stop = (
        x.expand(batch, -1).to(torch.int32).contiguous() for x in (rows, start, stop)
    )
    listed = torch.tensor(heads, dtype=torch.int32)
    columns = torch.empty(batch, len(listed), keys)
    diagonals = torch.empty(batch, len(listed), -(-keys // BIN))
    kernel = _library()
    kernel.sums(
        PACK_SUMS(
            ABI_VERSION,
            DTYPES[q.dtype],
            batch,
            num_heads,
            kv_heads,
            queries,
            keys,
            channels,
            rows.shape[1],
            len(listed),
            min(local, keys),
            *(x.data_ptr() for x in (q, k, rows, start, stop, listed, columns, diagonals)),
            *q.stride(),
            *k.stride(),
            torch.get_num_threads(),
            kernel.variant,
            scale,
        )
    )
    return columns, diagonals


def choose(scores: Tensor, costs: Tensor, forced: Tensor, budget: int) -> Tensor:
    """Bool as `scores`, float32 `[L, K]`; see `sparse_dit.estimate.budget.within`."""
    scores, costs, forced = scores.float().contiguous(), costs.contiguous(), forced.contiguous()
    shape = (scores.shape[1],)
    if (
        costs.dtype != torch.int64
        or forced.dtype != torch.bool
        or not costs.shape == forced.shape == shape
    ):
        raise ValueError(f"costs must be int64 and forced bool, of shape {shape}")
    chosen = torch.empty(scores.shape, dtype=torch.bool)
    pointers = (x.data_ptr() for x in (scores, costs, forced))
    _library().choose(
        PACK_CHOICE(
            ABI_VERSION,
            *scores.shape,
            *pointers,
            budget,
            chosen.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return chosen


def lay_runs(chosen: Tensor, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor]:
    """int32 `[L, G + 1]` and `[R, 2]`: key runs of groups; see `sparse_dit.estimate.runs.slash_entries`."""
    chosen = chosen.contiguous()
    heads, candidates = chosen.shape
    if chosen.dtype != torch.bool or candidates != num_keys + -(-num_keys // BIN):
        raise ValueError(
            f"chosen must be bool, columns and bins of {num_keys} keys, got {candidates}"
        )
    offsets = torch.empty(heads, -(-num_queries // GROUP) + 1, dtype=torch.int32)

    def lay(runs: int) -> None:
        problem = (ABI_VERSION, heads, num_queries, num_keys, chosen.data_ptr(), offsets.data_ptr())
        _library().lay_runs(PACK_RUNS(*problem, runs, torch.get_num_threads()))

    lay(0)
    runs = torch.empty(int(offsets[:, -1].sum()), 2, dtype=torch.int32)
    if len(runs):
        lay(runs.data_ptr())
    return offsets, runs


def means_takes(x: Tensor) -> bool:
    """Whether the library is there and takes the means of such a tensor."""
    return library.LIBRARY is not None and x.is_cpu and x.dtype in DTYPES


def means(x: Tensor, order: Tensor | None, bounds: Tensor) -> Tensor:
    """float32 `[B, H, S, D]`: means of stretches of sorted tokens.

    Args:
        x: `[B, H, N, D]`, any strides.
        order: int32 `[N]`: the token at each sorted position; None if tokens stay in place.
        bounds: int32 `[S + 1]`: sorted positions.
    """
    batch, heads, tokens, channels = x.shape
    if bounds.dtype != torch.int32 or (
        order is not None and (order.dtype != torch.int32 or order.shape != (tokens,))
    ):
        raise ValueError(f"bounds and order must be int32, and order of {tokens} tokens")
    bounds, order = bounds.contiguous(), None if order is None else order.contiguous()
    found = torch.empty(batch, heads, len(bounds) - 1, channels)
    pointers = (x.data_ptr(), _address(order), bounds.data_ptr(), found.data_ptr())
    sizes = (batch, heads, tokens, channels, len(bounds) - 1)
    problem = (ABI_VERSION, DTYPES[x.dtype], *sizes, *pointers, *x.stride())
    _library().means(PACK_MEANS(*problem, torch.get_num_threads()))
    return found


def lay_blocks(
    chosen: Tensor, bounds: Tensor, owner: Tensor, tokens: int, pool_of: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Run offsets int32 `[L, G + 1]` and runs `[R, 2]` of what is seen exactly, and the same of pooled keys.

    Args:
        chosen: Bool `[L, C, C]`: which blocks of keys each block of queries sees.
        bounds: int32 `[C + 1]`: sorted positions of the blocks.
        owner: int32 `[G]`: the block of each group's rows; -1 for rows that see everything.
        tokens: N.
        pool_of: int32 `[C + 1]`: number of each block's first pooled key; None without a far field.
    """
    heads, blocks, _ = chosen.shape
    if chosen.dtype != torch.bool or chosen.shape[2] != blocks or len(bounds) != blocks + 1:
        raise ValueError(f"chosen must be bool and of pairs of {len(bounds) - 1} blocks")
    chosen, bounds, owner = (x.contiguous() for x in (chosen, bounds, owner))
    pool_of = None if pool_of is None else pool_of.contiguous()
    offsets = torch.empty(heads, len(owner) + 1, dtype=torch.int32)
    far_offsets = None if pool_of is None else torch.empty_like(offsets)

    def lay(runs: Tensor | None, far_runs: Tensor | None) -> None:
        given = (chosen, bounds, owner, pool_of)
        made = (offsets, runs, far_offsets, far_runs)
        problem = (ABI_VERSION, heads, tokens, blocks, len(owner), *map(_address, given))
        problem += (int(runs is not None), *map(_address, made), torch.get_num_threads())
        _library().lay_blocks(PACK_BLOCKS(*problem))

    lay(None, None)
    runs, far_runs = (
        torch.empty(max(1, 0 if of is None else int(of[:, -1].sum())), 2, dtype=torch.int32)
        for of in (offsets, far_offsets)
    )
    lay(runs, far_runs)
    count, far_count = (0 if of is None else int(of[:, -1].sum()) for of in (offsets, far_offsets))
    return offsets, runs[:count], far_offsets, far_runs[:far_count]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _library() -> Library:
    if library.LIBRARY is None:
        raise NotImplementedError(str(library.PROBLEM))
    return library.LIBRARY
