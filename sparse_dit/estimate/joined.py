"""What heads see, found in calls or not, as one index."""

from __future__ import annotations

from collections.abc import Mapping

from ..backends.triton.chosen import ChosenBlocks, ChosenIndex
from ..call import AttentionCall
from ..cut import slice_entry
from ..entry import PatternIndex
from ..index import SparseIndex, index_of
from .blocks import Chosen, entries_of

Seen = PatternIndex | Chosen | ChosenBlocks


def joined(seen: Mapping[int, Seen], call: AttentionCall, there: bool) -> SparseIndex | ChosenIndex:
    """The index of a call's heads.

    Args:
        seen: What each head sees, by head.
        call: The attention call.
        there: Whether blocks were chosen on the call's device, if any were.
    """
    chosen = {head: what for head, what in seen.items() if isinstance(what, ChosenBlocks)}
    known = {head: what for head, what in seen.items() if not isinstance(what, ChosenBlocks)}
    if not there:
        return _index_of(entries_of(known), call.q.shape[1])
    heads = {**chosen, **entries_of(known)}
    return ChosenIndex(tuple(heads[head] for head in sorted(heads)), call.q.device)


def _index_of(entries: Mapping[int, PatternIndex], rows: int) -> SparseIndex:
    """The index of all heads; of the last `rows` tokens, where entries are of all."""
    cut: dict[int, PatternIndex] = {}  # entries that heads share stay one
    for entry in entries.values():
        n = entry.num_queries
        if id(entry) not in cut:
            cut[id(entry)] = entry if n == rows else slice_entry(entry, n - rows, n)
    return index_of({head: cut[id(entry)] for head, entry in entries.items()})


def num_bytes(entry: Seen | ChosenIndex) -> int:
    """Memory of what is kept of a head, or of an index."""
    if isinstance(entry, Chosen | ChosenBlocks):
        return entry.bits.nbytes
    if isinstance(entry, ChosenIndex):
        return entry.num_bytes
    far = entry.far
    parts = [entry.q_order, entry.k_order, entry.q_offsets, entry.run_offsets, entry.runs]
    parts += [] if far is None else [far.cell_offsets, far.run_offsets, far.runs]
    return sum(x.numel() * x.element_size() for x in parts if x is not None)
