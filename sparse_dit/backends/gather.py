"""Gathered keys and PyTorch's own attention: correct on every device, no compiler needed.

For each chunk of query groups, the keys that they see are copied together and passed to
`scaled_dot_product_attention`. An additive bias per key carries the far field (log of the cell's size)
and switches padding off, so that groups of unequal length share a call at no cost. As NaN times a weight of
0 is NaN, keys that no row may see are made 0 first, and intervals by which rows of a group see other keys
have a product of their own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cells import cell_members, valid_cells
from ..index import PatternIndex, SparseIndex
from ..intervals import RowIntervals
from .attended import Attended
from .chunks import Chunk, chunks_of
from .sorting import without_padding


def unsupported(q: Tensor, index: SparseIndex) -> str | None:
    """Gather runs everything that PyTorch's attention runs."""
    return None


def unsupported_values(width: int) -> str | None:
    """Gather takes values of any width."""
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    rows: RowIntervals | None,
    scale: float,
    return_lse: bool,
    mass_block: int | None,
) -> Attended:
    """Attention over `[B, H, N, D]`; arguments as in `sparse_attention`."""
    k, v = (without_padding(x, rows, q.shape[2]) for x in (k, v))
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    wants_lse = return_lse or mass_block is not None
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if wants_lse else None
    mass = None
    if mass_block:
        shape = (*q.shape[:2], index.max_groups, -(-k.shape[2] // mass_block))
        mass = torch.zeros(shape, dtype=torch.float32, device=q.device)
    repeat = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for entry, heads in zip(index.entries, index.heads_of, strict=True):
            call = _Call(entry, None if rows is None else _item(rows, b), scale)
            for h in heads:
                into = _Into(
                    out[b, h],
                    None if lse is None else lse[b, h],
                    None if mass is None else mass[b, h],
                    mass_block,
                )
                _head(q[b, h], k[b, h // repeat], v[b, h // repeat], call, into)
    return Attended(out, lse if return_lse else None, mass)


def block_mass(
    q: Tensor,
    k: Tensor,
    index: SparseIndex,
    lse: Tensor,
    rows: RowIntervals | None,
    scale: float,
    mass_block: int,
) -> Tensor:
    """Mass from a cached LSE; arguments as in `sparse_dit.attention.block_mass`."""
    k = without_padding(k, rows, q.shape[2])
    shape = (*q.shape[:2], index.max_groups, -(-k.shape[2] // mass_block))
    mass = torch.zeros(shape, dtype=torch.float32, device=q.device)
    repeat = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for entry, heads in zip(index.entries, index.heads_of, strict=True):
            call = _Call(entry, None if rows is None else _item(rows, b), scale)
            for h in heads:
                _head_mass(q[b, h], k[b, h // repeat], lse[b, h], call, mass[b, h], mass_block)
    return mass


def _item(rows: RowIntervals, b: int) -> RowIntervals:
    """The intervals of one batch item, `[N]`."""
    bounds = (rows.start, rows.stop)
    return RowIntervals(*(x if x is None or x.ndim == 1 else x[b] for x in bounds))


@dataclass
class _Call:
    """What is the same for all heads of a pattern and batch item."""

    entry: PatternIndex
    rows: RowIntervals | None
    scale: float

    @property
    def by_row(self) -> bool:
        """Whether rows of a group may see other keys."""
        return self.rows is not None and not self.rows.uniform

    @functools.cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Start and stop of each row `[N]`, or `[1]` if all have the same."""
        assert self.rows is not None, "there are some"
        start, stop = self.rows.bounds(self.entry.num_keys, self.entry.num_queries)
        return start[0], stop[0]

    @functools.cached_property
    def valid(self) -> Tensor:
        """The keys that some row may see, int64 `[2]`."""
        if self.rows is None:
            whole = torch.tensor([0, self.entry.num_keys], device="cpu")
            return whole.to(self.entry.q_offsets.device)
        return self.rows.valid(self.entry.num_keys, self.entry.num_queries)[0]

    @functools.cached_property
    def places(self) -> _Places:
        """What there is to know of keys and then cells."""
        if self.rows is not None:
            return _places(self.entry, self.valid)
        if "places" not in self.entry.cache:
            self.entry.cache["places"] = _places(self.entry, self.valid)
        return self.entry.cache["places"]


class _Places(NamedTuple):
    """For keys and then cells: the first and the last (valid) token, and how many there are; `[M + C]`."""

    first: Tensor
    last: Tensor
    size: Tensor


def _places(entry: PatternIndex, valid: Tensor) -> _Places:
    token = torch.arange(entry.num_keys, device=valid.device)
    count = torch.ones(entry.num_keys, dtype=torch.float32, device=valid.device)
    if entry.far is None:
        return _Places(token, token, count)
    cells = valid_cells(entry, valid)
    return _Places(
        torch.cat([token, cells.first]),
        torch.cat([token, cells.last]),
        torch.cat([count, cells.size.float()]),
    )


@dataclass
class _Into:
    """Where a head's results go."""

    out: Tensor
    lse: Tensor | None
    mass: Tensor | None
    mass_block: int | None


def _head(q: Tensor, k: Tensor, v: Tensor, call: _Call, into: _Into) -> None:
    """One head, `[N, D]`."""
    entry = call.entry
    if entry.is_empty:
        into.out.zero_()
        if into.lse is not None:
            into.lse.fill_(-torch.inf)
        return
    if entry.is_dense and call.rows is None and into.lse is None:
        # 4-D, or PyTorch takes its slow path, which makes the N x M matrix
        q, k, v = (x[None, None] for x in (q, k, v))
        into.out.copy_(F.scaled_dot_product_attention(q, k, v, scale=call.scale)[0, 0])
        return
    if entry.far is not None:
        means, values = _pooled(k, v, call)
        k, v = torch.cat([k, means]), torch.cat([v, values])
    into.out.zero_()
    if into.lse is not None:
        into.lse.fill_(-torch.inf)
    for chunk in chunks_of(entry, on_cpu=q.device.type == "cpu"):
        _attend(q, k, v, chunk, call, into)


def _attend(q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, call: _Call, into: _Into) -> None:
    """One chunk of groups: g groups, r rows each, l keys each."""
    groups, rows = chunk.rows.shape
    length = chunk.keys.shape[1]
    flat = chunk.keys.flatten()
    queries = q.index_select(0, chunk.rows.flatten()).view(groups, 1, rows, -1)
    keys = k.index_select(0, flat).view(groups, 1, length, -1)
    values = v.index_select(0, flat).view(groups, 1, length, -1)
    bias = _bias(chunk, call, q)
    if call.by_row:
        out = _by_row(queries, keys, values, bias, chunk, call, into)
    elif into.lse is None:
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=bias, scale=call.scale
        )
    else:
        out = _with_lse(queries, keys, values, bias, chunk, call, into)
    into.out.index_copy_(0, chunk.real_rows, out.view(-1, out.shape[-1])[chunk.real])


def _by_row(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    chunk: Chunk,
    call: _Call,
    into: _Into,
) -> Tensor:
    """The same as `_with_lse`, but NaN and Inf in a key or value make NaN only in the rows that see it."""
    odd = ~(keys.isfinite().all(-1) & values.isfinite().all(-1))[:, :, None]
    keys, values = (x.masked_fill(odd.transpose(-1, -2), 0.0) for x in (keys, values))
    hurt = (odd & (bias > -torch.inf)).any(-1, keepdim=True)
    return _with_lse(queries, keys, values, bias.masked_fill(hurt, torch.nan), chunk, call, into)


def _bias(chunk: Chunk, call: _Call, q: Tensor) -> Tensor:
    """Additive bias `[g, 1, 1 or r, l]`: 0, log of a cell's size, or -inf."""
    if call.rows is None:
        return chunk.bias.to(q.dtype)[:, None, None]
    keys = chunk.keys.long()
    first, last, count = (x[keys][:, None, None] for x in call.places)
    start, stop = call.bounds
    if call.by_row:
        start, stop = (x[chunk.rows.long()][:, None, :, None] for x in (start, stop))
    bias = count.log().masked_fill(chunk.is_pad[:, None, None], -torch.inf)
    return bias.masked_fill((first < start) | (last >= stop), -torch.inf).to(q.dtype)


def _pooled(k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    """Mean key and value `[C, D]` of the valid tokens of each cell; others are 0 already."""
    owner, tokens = cell_members(call.entry)
    count = call.places.size[call.entry.num_keys :].clamp_min(1)[:, None]
    pooled = []
    for x in (k, v):
        rows = x.index_select(0, tokens).to(torch.promote_types(x.dtype, torch.float32))
        total = rows.new_zeros(len(count), x.shape[1]).index_add_(0, owner, rows)
        pooled.append((total / count).to(x.dtype))
    return pooled[0], pooled[1]


def _with_lse(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    chunk: Chunk,
    call: _Call,
    into: _Into,
) -> Tensor:
    """Dense attention in at least float32, which also writes LSE and block mass where they are asked for."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    logits = queries.to(wide) @ keys.to(wide).transpose(-1, -2) * call.scale + bias
    lse = logits.logsumexp(-1)
    weights = logits.softmax(-1).masked_fill(lse.isneginf()[..., None], 0.0)
    if into.lse is not None:
        into.lse.index_copy_(0, chunk.real_rows, lse.flatten()[chunk.real].float())
    if into.mass is not None:
        _write_mass(weights, chunk, call, into.mass, into.mass_block)
    return (weights @ values.to(wide)).to(values.dtype)


def _head_mass(
    q: Tensor, k: Tensor, lse: Tensor, call: _Call, mass: Tensor, mass_block: int
) -> None:
    """Mass of one head, `[G, blocks]`; pooled keys have none, so any key stands for them."""
    wide = torch.promote_types(q.dtype, torch.float32)
    for chunk in chunks_of(call.entry, on_cpu=q.device.type == "cpu"):
        rows, keys = chunk.rows.long(), chunk.keys.long().clamp_max(call.entry.num_keys - 1)
        logits = (q[rows].to(wide) @ k[keys].to(wide).transpose(-1, -2) * call.scale)[:, None]
        floor = lse[rows][:, None, :, None].to(wide)
        weights = (logits + _bias(chunk, call, logits) - floor).exp()
        weights = weights.masked_fill(floor.isneginf(), 0.0)
        _write_mass(weights, chunk, call, mass, mass_block)


def _write_mass(
    weights: Tensor, chunk: Chunk, call: _Call, mass: Tensor, mass_block: int | None
) -> None:
    """Sum weights `[g, 1, r, l]` over rows and blocks of keys into the rows of `mass`."""
    assert mass_block is not None, "with a mass comes its block"
    block = _key_blocks(call.entry, mass_block)[chunk.keys.long()]
    real = torch.zeros(chunk.rows.numel(), dtype=torch.bool, device=weights.device)
    real[chunk.real] = True
    weight = (weights[:, 0] * real.view(chunk.rows.shape)[..., None]).sum(1).float()
    table = mass.new_zeros(len(chunk.groups), mass.shape[1] + 1)
    table.scatter_add_(1, block, weight)
    mass[chunk.groups] = table[:, :-1]


def _key_blocks(entry: PatternIndex, block: int) -> Tensor:
    """For keys and then cells: the block of sorted keys; cells count for none (the last + 1)."""
    key = ("blocks", block)
    if key not in entry.cache:
        position = torch.empty(entry.num_keys, dtype=torch.int64, device=entry.q_offsets.device)
        position[entry.key_tokens] = torch.arange(entry.num_keys, device=position.device)
        cells = 0 if entry.far is None else len(entry.far.cell_offsets) - 1
        none = torch.full((cells,), -(-entry.num_keys // block), device=position.device)
        entry.cache[key] = torch.cat([position // block, none])
    return entry.cache[key]
