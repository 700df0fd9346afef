"""The index of one layer's call, estimated from its own queries and keys."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..entry import PatternIndex
from ..index import SparseIndex, dense_entry
from ..intervals import RowIntervals, causal_rows
from ..modalities import Modalities
from ..on_cpu import on_cpu
from ..patterns.dense import Dense
from ..patterns.estimated import Grid, PooledBlocks, Shape, SinkWindow, VerticalSlash
from .budget import choose, local_bins
from .grid import grid_entries
from .pooled import pooled_entries
from .rows import BIN, CallRows, call_rows, sample_rows
from .runs import slash_entries
from .sums import SampledSums, sampled_sums


@on_cpu
@torch.no_grad()
def estimated_index(
    q: Tensor,
    k: Tensor,
    shapes: Sequence[Shape],
    *,
    scale: float | None = None,
    rows: RowIntervals | None = None,
    modalities: Modalities | None = None,
) -> SparseIndex:
    """An index for a causal prefill, or a chunk of one, whose rows are the last N of M tokens.

    Each row sees its own key at least. One index serves all batch items: what the rows of all of them need.
    Prompts that differ get better ones by a call for each.

    Args:
        q: `[B, H, N, D]`, any strides; N at most M.
        k: `[B, num_kv_heads, M, D]`, any strides; H must be a multiple of `num_kv_heads`.
        shapes: One for each head. Heads of the same shape are estimated together.
        scale: Factor of the logits; `D ** -0.5` if None.
        rows: Intervals of the call besides causal order, `[B, N]`, for padding or packed sequences; the call
            must be given them too.
        modalities: Where images and videos lie among the M keys of all items; None if there are none.

    Returns:
        An index with causal order as its `rows`, on the device of `q`.

    Raises:
        ValueError: If the shapes of the tensors don't fit together.
    """
    _check(q, k, shapes)
    num_queries, num_keys = q.shape[2], k.shape[2]
    if rows is not None:
        rows.check((q.shape[0], num_queries))
    if modalities is not None and modalities.length != num_keys:
        raise ValueError(
            f"modalities must be of the call's {num_keys} keys, got those of {modalities.length} tokens"
        )
    call = call_rows(num_queries, num_keys, rows)
    factor = float(q.shape[-1] ** -0.5) if scale is None else scale
    entries, places = [], [0] * len(shapes)
    for heads, made in _by_shape(q, k, shapes, call, factor, modalities):
        alike = len(made) == 1
        for i, head in enumerate(heads):
            places[head] = len(entries) + (0 if alike else i)
        entries += made
    index = SparseIndex(
        tuple(entries), tuple(places), causal_rows(num_queries, num_keys, num_keys - num_queries)
    )
    return index if q.is_cpu else index.to(q.device)


def sighted(shapes: Sequence[Shape]) -> bool:
    """Whether what is seen depends on where images and videos lie."""
    return any(isinstance(shape, Grid) for shape in shapes)


def _by_shape(
    q: Tensor,
    k: Tensor,
    shapes: Sequence[Shape],
    call: CallRows,
    scale: float,
    modalities: Modalities | None,
) -> list[tuple[list[int], list[PatternIndex]]]:
    """Heads, and an entry for each of them or one for them all."""
    made, sampled = [], {}
    size = q.shape[2], call.num_keys
    for shape in dict.fromkeys(shapes):
        heads = [head for head, of in enumerate(shapes) if of == shape]
        if isinstance(shape, Dense) or is_dense(shape, call.num_keys):
            made.append((heads, [dense_entry(*size)]))
        elif isinstance(shape, SinkWindow):
            made.append((heads, [_sink_window(shape, call)]))
        elif isinstance(shape, PooledBlocks):
            made.append((heads, pooled_entries(q, k, call, heads, shape, scale)))
        elif isinstance(shape, Grid) and modalities is not None and modalities.media:
            made.append((heads, grid_entries(q, k, call, heads, shape, scale, modalities)))
        else:
            key = (shape.rows, shape.sampled, local_bins(shape.local) * BIN)
            sampled.setdefault(key, []).append((shape, heads))
    for (kind, count, local), wanted in sampled.items():
        sample = sample_rows(call, kind, count)
        heads = sorted(head for _, of in wanted for head in of)
        sums = sampled_sums(q, k, sample, scale=scale, heads=heads, local=local)
        made.append(_vertical_slash(sums, call, wanted, heads))
    return made


def is_dense(shape: VerticalSlash | PooledBlocks | SinkWindow | Grid, num_keys: int) -> bool:
    """Whether a shape's budget is the whole call."""
    return shape.budget.keys(num_keys) >= num_keys


def _vertical_slash(
    sums: SampledSums,
    call: CallRows,
    wanted: list[tuple[VerticalSlash | Grid, list[int]]],
    heads: list[int],
) -> tuple[list[int], list[PatternIndex]]:
    """Heads of shapes that need the same sums, and an entry for each."""
    columns, diagonals = sums.means_of_all()
    parts = []
    for shape, of in wanted:
        at = slice(None) if of == heads else [heads.index(head) for head in of]
        sizes = {"sinks": shape.sinks, "local": shape.local}
        parts.append(choose(columns[at], diagonals[at], call, shape.budget, **sizes))
    chosen = parts[0] if len(parts) == 1 else torch.cat(parts)
    size = call.rows.shape[1], call.num_keys
    return [head for _, of in wanted for head in of], slash_entries(chosen, *size)


def _sink_window(shape: SinkWindow, call: CallRows) -> PatternIndex:
    window = max(1, shape.budget.keys(call.num_keys) - shape.sinks)
    if call is call_rows(call.rows.shape[1], call.num_keys, None):
        return _static_window(shape.sinks, window, call.rows.shape[1], call.num_keys)
    return _window(call, shape.sinks, window)


@functools.lru_cache(maxsize=64)
@on_cpu
def _static_window(sinks: int, window: int, num_queries: int, num_keys: int) -> PatternIndex:
    return _window(call_rows(num_queries, num_keys, None), sinks, window)


def _window(call: CallRows, sinks: int, window: int) -> PatternIndex:
    """Sinks, and about `window` keys: for each group those from so many before its middle row."""
    bins = torch.arange(-(-call.num_keys // BIN)) < max(1, round((window - BIN / 2) / BIN))
    chosen = torch.cat([call.sinks(sinks), bins])
    return slash_entries(chosen[None], call.rows.shape[1], call.num_keys)[0]


def _check(q: Tensor, k: Tensor, shapes: Sequence[Shape]) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q must be [B, H, N, D] and k [B, num_kv_heads, M, D], got {list(q.shape)} and {list(k.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} heads must be a multiple of {k.shape[1]} key heads")
    if not 1 <= q.shape[2] <= k.shape[2] or q.shape[0] == 0:
        raise ValueError(
            "an estimate needs at least one batch item and one row, and no more rows than keys, got "
            f"{list(q.shape)} and {list(k.shape)}"
        )
    if len(shapes) != q.shape[1]:
        raise ValueError(f"shapes must be one for each of {q.shape[1]} heads, got {len(shapes)}")
    if q.dtype != k.dtype or q.device != k.device:
        raise ValueError(
            "q and k must share a dtype and a device, got "
            f"{q.dtype} on {q.device} and {k.dtype} on {k.device}"
        )
