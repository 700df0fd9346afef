"""The index of one layer's call, estimated from its own queries and keys."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..entry import PatternIndex
from ..index import SparseIndex, dense_entry, index_of
from ..intervals import RowIntervals, causal_rows
from ..modalities import MODALITIES, Modalities
from ..on_cpu import on_cpu
from ..patterns.dense import Dense
from ..patterns.estimated import (
    ByKey,
    ByQuery,
    Grid,
    OwnPart,
    PooledBlocks,
    Shape,
    SinkWindow,
    VerticalSlash,
)
from .budget import choose, local_bins
from .grid import grid_entries
from .parts import by_keys, by_rows, own_part
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
    if modalities is not None and not modalities.media:
        modalities = None
    call = call_rows(num_queries, num_keys, rows)
    factor = float(q.shape[-1] ** -0.5) if scale is None else scale
    seen = _index_rows(call, rows, modalities)
    scope = _Scope(q, k, call, call, factor, seen, modalities)
    found = _entries(scope, dict(enumerate(shapes)))
    index = replace(index_of(found), rows=seen)
    return index if q.is_cpu else index.to(q.device)


def sighted(shapes: Sequence[Shape]) -> bool:
    """Whether what is seen depends on where images and videos lie."""
    return any(isinstance(shape, Grid | OwnPart | ByKey | ByQuery) for shape in shapes)


@dataclass(frozen=True)
class _Scope:
    """What entries are estimated from, and for.

    Args:
        q, k, scale, modalities: As given; modalities are None if there are no images.
        call: All rows.
        rows: Those that are sampled, and whose pairs a budget counts.
        seen: Up to where each row sees keys.
        keys: Bool `[M]`: which keys are chosen from; None for all.
    """

    q: Tensor
    k: Tensor
    call: CallRows
    rows: CallRows
    scale: float
    seen: RowIntervals
    modalities: Modalities | None
    keys: Tensor | None = None

    @property
    def length(self) -> int:
        """How many keys are chosen from."""
        return self.call.num_keys if self.keys is None else int(self.keys.sum())


def _entries(scope: _Scope, shapes: Mapping[int, Shape]) -> dict[int, PatternIndex]:
    """An entry for each head of `shapes`; the same object for heads that share one."""
    found: dict[int, PatternIndex] = {}
    sampled: dict[tuple, list[tuple[VerticalSlash | Grid, list[int]]]] = {}
    call, size = scope.call, (scope.q.shape[2], scope.call.num_keys)
    for shape in dict.fromkeys(shapes.values()):
        heads = [head for head, of in shapes.items() if of == shape]
        if isinstance(shape, ByQuery | ByKey):
            found |= _by_modality(scope, shape, heads)
        elif isinstance(shape, OwnPart):
            stop = scope.seen.stop
            assert stop is not None, "causal order has stops"
            where = scope.modalities or Modalities(call.num_keys)
            found |= dict.fromkeys(heads, own_part(where, call, stop, shape.sinks))
        elif isinstance(shape, Dense) or is_dense(shape, scope.length):
            found |= dict.fromkeys(heads, dense_entry(*size))
        elif isinstance(shape, SinkWindow):
            found |= dict.fromkeys(heads, _sink_window(shape, call, scope.length))
        elif isinstance(shape, PooledBlocks):
            args = (scope.q, scope.k, call, heads, shape, scope.scale, scope.keys)
            found |= zip(heads, pooled_entries(*args), strict=True)
        elif isinstance(shape, Grid) and scope.modalities is not None:
            args = (scope.q, scope.k, scope.rows, heads, shape, scope.scale)
            made = grid_entries(*args, scope.modalities, scope.keys)
            found |= zip(heads, made, strict=True)
        else:
            key = (shape.rows, shape.sampled, local_bins(shape.local) * BIN)
            sampled.setdefault(key, []).append((shape, heads))
    for (kind, count, local), wanted in sampled.items():
        sample = sample_rows(scope.rows, kind, count)
        heads = sorted(head for _, of in wanted for head in of)
        sums = sampled_sums(scope.q, scope.k, sample, scale=scope.scale, heads=heads, local=local)
        found |= _vertical_slash(sums, scope, wanted, heads)
    return found


def _by_modality(
    scope: _Scope, shape: ByQuery | ByKey, heads: list[int]
) -> dict[int, PatternIndex]:
    """Entries of heads with a shape for each modality of the rows, or of the keys."""
    if scope.modalities is None:
        return _entries(scope, dict.fromkeys(heads, shape.text))
    kinds = scope.modalities.kinds()
    if isinstance(shape, ByQuery):
        kinds = kinds[scope.call.offset :]
    numbers = kinds.unique().tolist()
    parts = []
    for number in numbers:
        mine = kinds == number
        if isinstance(shape, ByQuery):
            part = replace(scope, rows=scope.call.of(mine))
        else:
            part = replace(scope, keys=mine)
        one: Shape = getattr(shape, MODALITIES[number])
        parts.append(_entries(part, dict.fromkeys(heads, one)))
    wanted = torch.zeros(scope.q.shape[2], dtype=torch.bool)
    wanted[scope.rows.rows.flatten().long()] = True
    made: dict[tuple[int, ...], PatternIndex] = {}
    found = {}
    for head in heads:
        entries = [part[head] for part in parts]
        key = tuple(map(id, entries))
        if key not in made and isinstance(shape, ByQuery):
            made[key] = by_rows(entries, torch.searchsorted(torch.tensor(numbers), kinds))
        elif key not in made:
            made[key] = by_keys(entries, kinds, numbers, wanted)
        found[head] = made[key]
    return found


def _index_rows(
    call: CallRows, rows: RowIntervals | None, modalities: Modalities | None
) -> RowIntervals:
    """Causal order, but for images whose rows a mask lets see what comes later."""
    n, m = call.rows.shape[1], call.num_keys
    causal = causal_rows(n, m, call.offset)
    if rows is None or rows.stop is None or modalities is None:
        return causal
    key = ("images both ways", n, m)
    if key not in rows.cache:
        assert causal.stop is not None, "causal order has stops"
        stop = rows.to("cpu").bounds(m, n)[1].expand(-1, n).amax(0)
        wide = causal.stop.maximum(stop * (modalities.kinds()[call.offset :] > 0))
        rows.cache[key] = RowIntervals(stop=wide) if (wide > causal.stop).any() else causal
    found = rows.cache[key]
    assert isinstance(found, RowIntervals)
    return found


def is_dense(shape: VerticalSlash | PooledBlocks | SinkWindow | Grid, num_keys: int) -> bool:
    """Whether a shape's budget is the whole call."""
    return shape.budget.keys(num_keys) >= num_keys


def _vertical_slash(
    sums: SampledSums,
    scope: _Scope,
    wanted: list[tuple[VerticalSlash | Grid, list[int]]],
    heads: list[int],
) -> dict[int, PatternIndex]:
    """Entries of heads of shapes that need the same sums."""
    columns, diagonals = sums.means_of_all()
    parts = []
    for shape, of in wanted:
        at = slice(None) if of == heads else [heads.index(head) for head in of]
        sizes = {"sinks": shape.sinks, "local": shape.local}
        parts.append(
            choose(columns[at], diagonals[at], scope.rows, shape.budget, keys=scope.keys, **sizes)
        )
    chosen = parts[0] if len(parts) == 1 else torch.cat(parts)
    entries = slash_entries(chosen, scope.q.shape[2], scope.call.num_keys)
    return dict(zip((head for _, of in wanted for head in of), entries, strict=True))


def _sink_window(shape: SinkWindow, call: CallRows, length: int) -> PatternIndex:
    window = max(1, shape.budget.keys(length) - shape.sinks)
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
