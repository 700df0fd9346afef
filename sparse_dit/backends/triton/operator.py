"""The Triton backend as torch operators, so that compiled and exported programs can call it.

- `sparse_dit::triton_attend(q, k, v, index, words, row_start, row_stop, scale) -> (out, lse)`
- `sparse_dit::triton_mass(q, k, index, words, lse, row_start, row_stop, scale, mass_block) -> mass`

`index` is the tensors of a `SparseIndex` and `words` its numbers. What was made of them is kept, and found
again by their addresses: nothing is read from the device for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ...index import FarField, PatternIndex, SparseIndex
from ...intervals import RowIntervals
from .. import selfcheck

KEPT = 256  # indices: layers times stages of the sizes in use
ENTRY_WORDS = 3  # queries; keys; bits: q_order, k_order, k_order is q_order, far field
_INDICES: OrderedDict[tuple, SparseIndex] = OrderedDict()
_ENTRIES: WeakValueDictionary[tuple, PatternIndex] = WeakValueDictionary()
_ROWS: WeakValueDictionary[tuple, RowIntervals] = WeakValueDictionary()


def parts_of(index: SparseIndex) -> tuple[list[Tensor], list[int]]:
    """The tensors and the numbers of an index, from which `index_of` makes it again."""
    bounds = (None, None) if index.rows is None else (index.rows.start, index.rows.stop)
    tensors = [x for x in bounds if x is not None]
    words = [len(index.entries), *(int(x is not None) for x in bounds)]
    for e in index.entries:
        shared = e.k_order is e.q_order
        orders = [x for x in (e.q_order, None if shared else e.k_order) if x is not None]
        tensors += [*orders, e.q_offsets, e.run_offsets, e.runs]
        if e.far is not None:
            tensors += [e.far.cell_offsets, e.far.run_offsets, e.far.runs]
        bits = (e.q_order is not None) + 2 * (e.k_order is not None) + 4 * shared
        words += [e.num_queries, e.num_keys, bits + 8 * (e.far is not None)]
    return tensors, [*words, *index.head_to_pattern]


def index_of(tensors: Sequence[Tensor], words: Sequence[int]) -> SparseIndex:
    """The index of these parts, the very same for the same memory; the last `KEPT` are kept.

    It holds the tensors, so that their addresses can't become those of others.
    """
    key = (tuple(words), tuple(x.data_ptr() for x in tensors))
    index = _INDICES.get(key)
    if index is not None:
        _INDICES.move_to_end(key)
        return index
    count, starts, stops = words[:3]
    rest, heads = list(tensors), 3 + count * ENTRY_WORDS
    rows = _rows(rest.pop(0) if starts else None, rest.pop(0) if stops else None)
    entries = tuple(_entry(words[i : i + ENTRY_WORDS], rest) for i in range(3, heads, ENTRY_WORDS))
    index = SparseIndex(entries, tuple(words[heads:]), rows)
    _INDICES[key] = index
    if len(_INDICES) > KEPT:
        _INDICES.popitem(last=False)
    return index


def _rows(start: Tensor | None, stop: Tensor | None) -> RowIntervals | None:
    """Intervals of an index, the very same for the same memory."""
    if start is None and stop is None:
        return None
    key = tuple(None if x is None else x.data_ptr() for x in (start, stop))
    rows = _ROWS.get(key)
    if rows is None:
        rows = _ROWS[key] = RowIntervals(start, stop)
    return rows


def _call_of(
    tensors: Sequence[Tensor],
    words: Sequence[int],
    row_start: Tensor | None,
    row_stop: Tensor | None,
) -> tuple[SparseIndex, RowIntervals | None]:
    """The index of a call, and the intervals that hold: its own where the call has none."""
    index = index_of(tensors, words)
    none = row_start is None and row_stop is None
    return index, index.rows if none else RowIntervals(row_start, row_stop)


def _entry(words: Sequence[int], rest: list[Tensor]) -> PatternIndex:
    """One entry, which takes its tensors from the front of `rest`; indices share it."""
    queries, keys, bits = words
    q_order = rest.pop(0) if bits & 1 else None
    shared = bool(bits & 4)
    k_order = q_order if shared else rest.pop(0) if bits & 2 else None
    (offsets, run_offsets, runs), rest[:3] = rest[:3], []
    cells: list[Tensor] = []
    if bits & 8:
        cells, rest[:3] = rest[:3], []
    own = [
        x
        for x in (q_order, None if shared else k_order, offsets, run_offsets, runs, *cells)
        if x is not None
    ]
    key = (*words, *(x.data_ptr() for x in own))
    entry = _ENTRIES.get(key)
    if entry is None:
        far = FarField(*cells) if cells else None
        entry = PatternIndex(queries, keys, q_order, k_order, offsets, run_offsets, runs, far)
        _ENTRIES[key] = entry
    return entry


def _attend(
    q: Tensor, k: Tensor, v: Tensor, index: Sequence[Tensor], words: Sequence[int],
    row_start: Tensor | None, row_stop: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .. import triton as backend

    _must_be_right(q)
    found, rows = _call_of(index, words, row_start, row_stop)
    got = backend.forward(q, k, v, found, rows, scale, True, None)
    assert got.lse is not None, "it was asked for"
    out = torch.empty_like(q)  # the strides that were promised
    return (got.out if got.out.stride() == out.stride() else out.copy_(got.out)), got.lse


def _fake_attend(
    q: Tensor, k: Tensor, v: Tensor, index: Sequence[Tensor], words: Sequence[int],
    row_start: Tensor | None, row_stop: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _mass(
    q: Tensor, k: Tensor, index: Sequence[Tensor], words: Sequence[int], lse: Tensor,
    row_start: Tensor | None, row_stop: Tensor | None, scale: float, mass_block: int, groups: int,
) -> Tensor:  # fmt: skip
    from .. import triton as backend

    _must_be_right(q)
    found, rows = _call_of(index, words, row_start, row_stop)
    return backend.block_mass(q, k, found, lse, rows, scale, mass_block)


def _fake_mass(
    q: Tensor, k: Tensor, index: Sequence[Tensor], words: Sequence[int], lse: Tensor,
    row_start: Tensor | None, row_stop: Tensor | None, scale: float, mass_block: int, groups: int,
) -> Tensor:  # fmt: skip
    blocks = (k.shape[2] + mass_block - 1) // mass_block
    return q.new_empty((q.shape[0], q.shape[1], groups, blocks), dtype=torch.float32)


def _must_be_right(q: Tensor) -> None:
    """The check before first use, which tracing leaves out."""
    from .. import triton as backend

    if q.is_cpu:
        return
    found: Any = selfcheck.verdict(backend, q.device, q.shape[-1], q.dtype)
    if found is not None and found.problem is not None:
        raise NotImplementedError(
            f"backend 'triton' failed its check on {q.device}: {found.problem}; "
            "compile with backend='gather'"
        )


# its first call builds tables on the host, which a captured CUDA graph can't
_TAGS = [t for t in (getattr(torch.Tag, "cudagraph_unsafe", None),) if t is not None]
OPERATORS = torch.library.Library("sparse_dit", "FRAGMENT")  # they live as long as this does
_INDEX, _SHARED = (
    "Tensor[] index, SymInt[] words",
    "Tensor? row_start, Tensor? row_stop, float scale",
)
for _name, _schema, _real, _fake in (
    (
        "triton_attend",
        f"(Tensor q, Tensor k, Tensor v, {_INDEX}, {_SHARED}) -> (Tensor out, Tensor lse)",
        _attend,
        _fake_attend,
    ),
    (
        "triton_mass",
        f"(Tensor q, Tensor k, {_INDEX}, Tensor lse, {_SHARED}, SymInt mass_block, "
        "SymInt groups) -> Tensor",
        _mass,
        _fake_mass,
    ),
):
    OPERATORS.define(_name + _schema, tags=_TAGS)
    OPERATORS.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparse_dit::{_name}", _fake, lib=OPERATORS)
