"""Gathered keys and PyTorch's own attention: correct on every device, no compiler needed.

For each chunk of query groups, the keys that they see are copied together and passed to
`scaled_dot_product_attention`. An additive bias per key carries the far field (log of the cell's size)
and switches padding off, so that groups of unequal length share a call at no cost. As NaN times a weight of
0 is NaN, padding is made 0 first, and causal order, by which rows of a group see other keys, has a product of
its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..index import PatternIndex, SparseIndex, last_tokens
from .attended import Attended
from .chunks import Chunk, chunks_of


def unsupported(q: Tensor, index: SparseIndex) -> str | None:
    """Gather runs everything that PyTorch's attention runs."""
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    kv_len: Tensor | None,
    scale: float,
    return_lse: bool,
    mass_block: int | None,
) -> Attended:
    """Attention over `[B, H, N, D]`; arguments as in `sparse_attention`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    wants_lse = return_lse or mass_block is not None
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if wants_lse else None
    mass = None
    if mass_block:
        shape = (*q.shape[:2], index.max_groups, -(-k.shape[2] // mass_block))
        mass = torch.zeros(shape, dtype=torch.float32, device=q.device)
    repeat = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        valid = k.shape[2] if kv_len is None else int(kv_len[b])
        for entry, heads in zip(index.entries, index.heads_of, strict=True):
            call = _Call(entry, index, valid, scale)
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
    kv_len: Tensor | None,
    scale: float,
    mass_block: int,
) -> Tensor:
    """Mass from a cached LSE; arguments as in `sparse_dit.attention.block_mass`."""
    shape = (*q.shape[:2], index.max_groups, -(-k.shape[2] // mass_block))
    mass = torch.zeros(shape, dtype=torch.float32, device=q.device)
    repeat = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        valid = k.shape[2] if kv_len is None else int(kv_len[b])
        for entry, heads in zip(index.entries, index.heads_of, strict=True):
            call = _Call(entry, index, valid, scale)
            for h in heads:
                if valid:
                    _head_mass(q[b, h], k[b, h // repeat], lse[b, h], call, mass[b, h], mass_block)
    return mass


@dataclass
class _Call:
    """What is the same for all heads of a pattern."""

    entry: PatternIndex
    index: SparseIndex
    valid: int
    scale: float

    @property
    def plain(self) -> bool:
        """Whether no key is switched off by padding or order."""
        return self.valid == self.entry.num_keys and not self.index.causal


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
    if entry.is_empty or call.valid == 0:
        into.out.zero_()
        if into.lse is not None:
            into.lse.fill_(-torch.inf)
        return
    if entry.is_dense and call.plain and into.lse is None:
        # 4-D, or PyTorch takes its slow path, which makes the N x M matrix
        q, k, v = (x[None, None] for x in (q, k, v))
        into.out.copy_(F.scaled_dot_product_attention(q, k, v, scale=call.scale)[0, 0])
        return
    k, v = _without_padding(k, call), _without_padding(v, call)
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
    if call.index.causal:
        out = _causal(queries, keys, values, bias, chunk, call, into)
    elif into.lse is None:
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=bias, scale=call.scale
        )
    else:
        out = _with_lse(queries, keys, values, bias, chunk, call, into)
    into.out.index_copy_(0, chunk.real_rows, out.view(-1, out.shape[-1])[chunk.real])


def _without_padding(x: Tensor, call: _Call) -> Tensor:
    """Keys or values `[M, D]` of one head, with 0 for padding."""
    padding = call.entry.num_keys - call.valid
    return F.pad(x[: call.valid], (0, 0, 0, padding)) if padding else x


def _causal(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    chunk: Chunk,
    call: _Call,
    into: _Into,
) -> Tensor:
    """The same as `_with_lse`, but NaN and Inf in a key or value make NaN only in the rows that see it."""
    odd = ~(keys.isfinite() & values.isfinite()).all(-1)[:, :, None]
    keys, values = (x.masked_fill(odd.transpose(-1, -2), 0.0) for x in (keys, values))
    hurt = (odd & (bias > -torch.inf)).any(-1, keepdim=True)
    return _with_lse(queries, keys, values, bias.masked_fill(hurt, torch.nan), chunk, call, into)


def _bias(chunk: Chunk, call: _Call, q: Tensor) -> Tensor:
    """Additive bias `[g, 1, 1 or r, l]`: 0, log of a cell's size, or -inf."""
    if call.plain:
        return chunk.bias.to(q.dtype)[:, None, None]
    token, log_size = _tokens(call)
    last = token[chunk.keys.long()]
    bias = torch.where(chunk.is_pad, -torch.inf, log_size[chunk.keys.long()])[:, None, None]
    bias = bias.masked_fill(
        (last >= call.valid)[:, None, None] | (last < 0)[:, None, None], -torch.inf
    )
    if call.index.causal:
        limit = chunk.rows.long() + call.index.causal_offset
        bias = bias.masked_fill(last[:, None, None] > limit[:, None, :, None], -torch.inf)
    return bias.to(q.dtype)


def _tokens(call: _Call) -> tuple[Tensor, Tensor]:
    """For keys and then cells: the (last valid) token, and log of the number of valid tokens."""
    key = ("tokens", call.valid)
    if key not in call.entry.cache:
        entry, device = call.entry, call.entry.q_offsets.device
        token = torch.arange(entry.num_keys, device=device)
        log_size = torch.zeros(entry.num_keys, dtype=torch.float32, device=device)
        if entry.far is not None:
            last = last_tokens(entry.far, entry.key_tokens, call.valid)
            token = torch.cat([token, last])
            log_size = torch.cat([log_size, _sizes(call).clamp_min(1).log()])
        call.entry.cache[key] = (token, log_size)
    return call.entry.cache[key]


def _sizes(call: _Call) -> Tensor:
    """float32 `[C]`: valid tokens in each cell."""
    far = call.entry.far
    cells = far.cell_offsets.long()
    if call.valid == call.entry.num_keys:
        return cells.diff().float()
    ok = (call.entry.key_tokens < call.valid).cumsum(0)  # of ints: deterministic on every device
    total = F.pad(ok, (1, 0))
    return (total[cells[1:]] - total[cells[:-1]]).float()


def _pooled(k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    """Mean key and value `[C, D]` of the valid tokens of each cell; padding is 0 already."""
    entry, far = call.entry, call.entry.far
    start, stop = int(far.cell_offsets[0]), int(far.cell_offsets[-1])
    lengths = entry.cache.get("cell lengths")
    if lengths is None:
        sizes = far.cell_offsets.diff().long()
        owner = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
        lengths = entry.cache["cell lengths"] = (owner, entry.key_tokens[start:stop])
    owner, tokens = lengths
    count = _sizes(call).clamp_min(1)[:, None]
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
    k = _without_padding(k, call)
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
