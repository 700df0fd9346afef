"""PyTorch's FlexAttention, always compiled, over the blocks of an index.

Uncompiled, FlexAttention reads the mask alone and computes everything; and a compiled one falls back to
that after some recompilations. So each shape has a code object of its own, compiled with `fullgraph=True`,
which raises instead. Partial blocks are masked by bits; order, padding and the far field (pooled keys
behind the others, with a bias) are a `score_mod`. NaN or Inf in a value shows in all rows of the blocks
that hold it. Each new size compiles: 4 to 10 s on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import Tensor

from ..index import SparseIndex
from .attended import Attended
from .flex_lists import FlexLists, lists_of
from .sorting import (
    max_cells,
    orders_of,
    pool_far_field,
    sort_tokens,
    unsort_tokens,
    without_padding,
)

BLOCK = {"cpu": 64, "cuda": 128}  # 128 is a multiple of what every CUDA configuration takes
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRAPHS = 64  # kept


def unsupported(q: Tensor, index: SparseIndex) -> str | None:
    """Why FlexAttention can't run this; None if it can."""
    if q.device.type not in BLOCK:
        return f"it was made for CPU and CUDA, but q is on {q.device}"
    if q.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, but q is {q.dtype}"
    if q.is_cuda and q.shape[-1] < 16:
        return f"head_dim must be at least 16 on CUDA, got {q.shape[-1]}"
    if torch.compiler.is_compiling():
        return "it can't be traced into a compiled graph"
    return None


def lacks(q: Tensor, return_lse: bool, mass: bool) -> str | None:
    """Why it can't give the LSE or block mass that is asked for, to follow its name; None if it can."""
    if mass:
        return "FlexAttention has no block mass"
    if return_lse and not q.is_cuda:
        return f"compiled FlexAttention gives no log-sum-exp on {q.device.type}"
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
    """Attention over `[B, H, N, D]`; arguments as in `sparse_attention`.

    Raises:
        NotImplementedError: If LSE or mass is wanted that it can't give, or it doesn't compile here.
    """
    if reason := lacks(q, return_lse, mass_block is not None):
        raise NotImplementedError(f"backend 'flex' cannot run this: {reason}")
    orders = orders_of(index)
    call = _call(q, k, v, index, kv_len)
    lists = lists_of(index, BLOCK[q.device.type])
    key = (q.device, q.dtype, call.q.shape, call.k.shape, lists.bits.shape, call.kind, return_lse)
    run = _compiled(key)
    arguments = (call.q, call.k, call.v, lists, call.bias, call.key_token, call.limit)
    try:
        out, lse = run(*arguments, scale, return_lse)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever dynamo, inductor or a compiler may raise
        first = (str(error).strip().splitlines() or [""])[0]
        raise NotImplementedError(
            f"FlexAttention must compile for {list(q.shape)} {q.dtype}, got "
            f"{type(error).__name__}: {first}; use another backend"
        ) from error
    if lse is not None:
        lse = unsort_tokens(lse.float(), orders.queries)
    return Attended(unsort_tokens(out, orders.queries), lse, None)


def block_mass(
    q: Tensor,
    k: Tensor,
    index: SparseIndex,
    lse: Tensor,
    kv_len: Tensor | None,
    scale: float,
    mass_block: int,
) -> Tensor:
    """Raise NotImplementedError: FlexAttention can't compute block mass."""
    raise NotImplementedError(f"backend 'flex' cannot run this: {lacks(q, False, True)}")


@dataclass(frozen=True)
class _Call:
    """Sorted tensors of a call, K = M + C keys.

    Args:
        q, k, v: `[B, H, N, D]`, `[B, H or key heads, K, D]`.
        bias: float32 `[B, H, K]`, or None if all keys count equally.
        key_token, limit: int32 `[B, H, K]` and `[H, N]`: a query sees keys up to its limit; or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    key_token: Tensor | None
    limit: Tensor | None

    @property
    def kind(self) -> tuple[bool, bool]:
        """Which compiled graph the call needs: whether with a bias, and whether with a limit."""
        return self.bias is not None, self.limit is not None


def _call(q: Tensor, k: Tensor, v: Tensor, index: SparseIndex, kv_len: Tensor | None) -> _Call:
    orders, cells = orders_of(index), max_cells(index)
    if cells or orders.keys is not None:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    k, v = without_padding(k, kv_len), without_padding(v, kv_len)
    pooled = pool_far_field(k, v, index, kv_len) if cells else None
    k, v = sort_tokens(k, orders.keys), sort_tokens(v, orders.keys)
    tokens = orders.keys
    if tokens is None:
        tokens = torch.arange(k.shape[2], device=q.device).expand(q.shape[1], -1)
    tokens = tokens.expand(q.shape[0], -1, -1)  # [B, H, M]
    bias = None
    if pooled is not None or kv_len is not None:
        bias = torch.zeros(tokens.shape, dtype=torch.float32, device=q.device)
        if kv_len is not None:
            bias = bias.masked_fill(tokens >= kv_len.to(q.device)[:, None, None], -torch.inf)
    if pooled is not None:
        k, v = torch.cat([k, pooled.keys], 2), torch.cat([v, pooled.values], 2)
        assert bias is not None, "made above"
        bias = torch.cat([bias, pooled.bias], 2)
        tokens = torch.cat([tokens, pooled.last], 2)
    if not index.causal:
        return _Call(sort_tokens(q, orders.queries), k, v, bias, None, None)
    rows = orders.queries
    if rows is None:
        rows = torch.arange(q.shape[2], device=q.device).expand(q.shape[1], -1)
    limit = (rows + index.causal_offset).int().contiguous()
    q = sort_tokens(q, orders.queries)
    return _Call(q, k, v, bias, tokens.int().contiguous(), limit)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: FlexLists,
    bias: Tensor | None,
    key_token: Tensor | None,
    limit: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """What is compiled; it never runs otherwise."""
    if not torch.compiler.is_compiling():
        raise RuntimeError("torch.compile is switched off, and uncompiled it ignores the lists")
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    number, bits, block = lists.number, lists.bits, lists.block

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        word = bits[number[h, i // block, j // block], i % block, (j % block) // 32]
        return ((word >> (j % 32)) & 1) == 1

    def scored(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if bias is not None:
            score = score + bias[b, h, j]
        if key_token is not None and limit is not None:
            score = torch.where(key_token[b, h, j] <= limit[h, i], score, -float("inf"))
        return score

    mask = BlockMask.from_kv_blocks(
        lists.partial_counts, lists.partial, lists.full_counts, lists.full, BLOCK_SIZE=block,
        mask_mod=seen, seq_lengths=(q.shape[2], k.shape[2]), compute_q_blocks=False,
    )  # fmt: skip
    options = {
        "score_mod": None if bias is None and limit is None else scored,
        "block_mask": mask,
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    if not return_lse:
        return flex_attention(q, k, v, **options), None
    return _with_lse(flex_attention, q, k, v, options)


def _with_lse(
    attention: Callable, q: Tensor, k: Tensor, v: Tensor, options: dict
) -> tuple[Tensor, Tensor]:
    """The argument that asks for LSE has changed its name."""
    from torch.nn.attention import flex_attention as module

    if hasattr(module, "AuxRequest"):
        out, aux = attention(q, k, v, return_aux=module.AuxRequest(lse=True), **options)
        return out, aux.lse
    return attention(q, k, v, return_lse=True, **options)


@functools.lru_cache(maxsize=GRAPHS)
def _compiled(key: object) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A compiled function for one shape; PyTorch limits graphs by code object, so each has its own."""
    own = FunctionType(_attention.__code__.replace(), _attention.__globals__, _attention.__name__)
    return torch.compile(own, fullgraph=True, dynamic=False)
