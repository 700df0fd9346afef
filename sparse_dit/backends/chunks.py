"""Query groups of a pattern index in chunks of equal shape, for the gather backend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..entry import PatternIndex, expand
from ..on_cpu import on_cpu

CPU_KEYS = 8192  # gathered key rows of a chunk: they should stay in cache
DEVICE_KEYS = 1 << 20
CACHED_KEYS = 1 << 24  # above this many gathered keys, chunks are built anew in each call


@dataclass(frozen=True, eq=False)
class Chunk:
    """g query groups padded to r rows and l keys.

    Args:
        groups: int64 `[g]`, group numbers.
        rows: int32 `[g, r]`, query tokens; groups with fewer rows repeat their first.
        real: int64, places in `rows.flatten()` that are not repeats.
        real_rows: int64, the query tokens at these places.
        keys: int32 `[g, l]`, key tokens, or M + cell for pooled keys; shorter groups repeat their first.
        is_pad: bool `[g, l]`, the repeats.
        bias: float32 `[g, l]`: 0, log of the cell's size, -inf for repeats.
    """

    groups: Tensor
    rows: Tensor
    real: Tensor
    real_rows: Tensor
    keys: Tensor
    is_pad: Tensor
    bias: Tensor


def chunks_of(entry: PatternIndex, on_cpu: bool) -> Iterable[Chunk]:
    """All groups that see anything, those of similar length together; cached on the entry."""
    cached = entry.cache.get("chunks")
    if cached is not None:
        return cached
    total = int((entry.group_keys + entry.group_cells).sum())
    if total > CACHED_KEYS:
        return _build(entry, on_cpu)
    entry.cache["chunks"] = result = list(_build(entry, on_cpu))
    return result


def _build(entry: PatternIndex, on_cpu: bool) -> Iterator[Chunk]:
    device = entry.q_offsets.device
    entry = entry.to("cpu")
    lengths = entry.group_keys + entry.group_cells
    budget = CPU_KEYS if on_cpu else DEVICE_KEYS
    groups: list[int] = []
    for group in lengths.argsort(stable=True).tolist():
        length = int(lengths[group])
        if length == 0:
            continue
        if groups and (len(groups) + 1) * length > budget:
            yield _chunk(entry, groups, device)
            groups = []
        groups.append(group)
    if groups:
        yield _chunk(entry, groups, device)


@on_cpu
def _chunk(entry: PatternIndex, groups: list[int], device: torch.device) -> Chunk:
    rows = [_rows(entry, group) for group in groups]
    keys = [_keys(entry, group) for group in groups]
    row_table, row_pad = _padded(list(rows))
    key_table, key_pad = _padded([tokens for tokens, _ in keys])
    bias = torch.zeros(key_table.shape, dtype=torch.float32)
    for place, (_, logs) in enumerate(keys):
        bias[place, : len(logs)] = logs
    real = (~row_pad).flatten().nonzero()[:, 0]
    tensors = (
        torch.tensor(groups),
        row_table.int(),
        real,
        row_table.flatten()[real].long(),
        key_table.int(),
        key_pad,
        bias.masked_fill(key_pad, -torch.inf),
    )
    return Chunk(*(tensor.to(device) for tensor in tensors))


def _rows(entry: PatternIndex, group: int) -> Tensor:
    start, stop = entry.q_offsets[group : group + 2].tolist()
    return entry.query_tokens[start:stop]


def _keys(entry: PatternIndex, group: int) -> tuple[Tensor, Tensor]:
    """Keys of a group (exact, then pooled as M + cell) and the logs of their sizes."""
    keys = expand(entry.runs[entry.run_offsets[group] : entry.run_offsets[group + 1]])
    keys = entry.key_tokens[keys]
    if entry.far is None:
        return keys, torch.zeros(len(keys), dtype=torch.float32)
    far = entry.far
    cells = expand(far.runs[far.run_offsets[group] : far.run_offsets[group + 1]])
    logs = far.cell_offsets.diff()[cells].float().log()
    return torch.cat([keys, cells + entry.num_keys]), torch.cat([logs.new_zeros(len(keys)), logs])


def _padded(lists: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Lists of unequal length as a table, shorter ones repeating their first item; and the repeats."""
    longest = max(len(item) for item in lists)
    table = torch.stack([torch.cat([i, i[:1].expand(longest - len(i))]) for i in lists])
    lengths = torch.tensor([len(item) for item in lists])
    return table, torch.arange(longest) >= lengths[:, None]
