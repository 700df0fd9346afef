"""PyTorch's FlexAttention, always compiled, over the blocks of an index.

Uncompiled, FlexAttention reads the mask alone and computes everything; and a compiled one falls back to
that after some recompilations. So each shape has a code object of its own, compiled with `fullgraph=True`,
which raises instead. Partial blocks are masked by bits; row intervals and the far field (pooled keys
behind the others, with a bias) are a `score_mod`. NaN or Inf in a value shows in all rows of the blocks
that hold it. Each new size compiles: 4 to 10 s on a CPU.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import Tensor

from ..index import SparseIndex
from ..intervals import RowIntervals
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
X86 = platform.machine() in ("x86_64", "AMD64")


def unsupported(q: Tensor, index: SparseIndex) -> str | None:
    """Why FlexAttention can't run this; None if it can."""
    if q.device.type not in BLOCK:
        return f"it was made for CPU and CUDA, but q is on {q.device}"
    if q.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, but q is {q.dtype}"
    if q.is_cuda and q.shape[-1] < 16:
        return f"head_dim must be at least 16 on CUDA, got {q.shape[-1]}"
    if q.is_cpu and X86 and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return "PyTorch compiles it for processors with AVX2 or AVX-512 alone"
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
    rows: RowIntervals | None,
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
    call = _call(q, k, v, index, rows)
    lists = lists_of(index, BLOCK[q.device.type])
    key = (q.device, q.dtype, call.q.shape, call.k.shape, lists.bits.shape, call.kind, return_lse)
    run = _compiled(key)
    arguments = (call.q, call.k, call.v, lists, call.bias, call.keys, call.rows)
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
    rows: RowIntervals | None,
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
        keys: int32 `[2, B, H, K]`: first and last token of each key; or None.
        rows: int32 `[2, B, H, N]`: where the tokens of the keys that a row sees start and stop; or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    keys: Tensor | None
    rows: Tensor | None

    @property
    def kind(self) -> tuple[bool, bool]:
        """Which compiled graph the call needs: whether with a bias, and whether with intervals."""
        return self.bias is not None, self.rows is not None


def _call(q: Tensor, k: Tensor, v: Tensor, index: SparseIndex, rows: RowIntervals | None) -> _Call:
    orders, cells, num_queries = orders_of(index), max_cells(index), q.shape[2]
    batch, heads, num_keys = q.shape[0], q.shape[1], k.shape[2]
    if cells or orders.keys is not None:
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    k, v = without_padding(k, rows, num_queries), without_padding(v, rows, num_queries)
    valid = None if rows is None else rows.valid(num_keys, num_queries)
    pooled = pool_far_field(k, v, index, valid) if cells else None
    q, k, v = (
        sort_tokens(q, orders.queries), sort_tokens(k, orders.keys), sort_tokens(v, orders.keys)
    )  # fmt: skip
    bias = None
    if pooled is not None:
        k, v = torch.cat([k, pooled.keys], 2), torch.cat([v, pooled.values], 2)
        bias = torch.cat([pooled.bias.new_zeros(batch, heads, num_keys), pooled.bias], 2)
    if rows is None:
        return _Call(q, k, v, bias, None, None)
    tokens = orders.keys
    if tokens is None:
        tokens = torch.arange(num_keys, device=q.device)
    first = last = tokens.expand(batch, heads, -1)
    if pooled is not None:
        first, last = torch.cat([first, pooled.first], 2), torch.cat([last, pooled.last], 2)
    bounds = (x.expand(batch, num_queries)[:, None] for x in rows.bounds(num_keys, num_queries))
    of_rows = torch.stack([x.expand(batch, heads, num_queries) for x in bounds])
    if orders.queries is not None:
        of_rows = of_rows.take_along_dim(orders.queries[None, None], 3)
    keys = torch.stack([first, last]).int()
    return _Call(q, k, v, bias, keys, of_rows.int().contiguous())


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: FlexLists,
    bias: Tensor | None,
    keys: Tensor | None,
    rows: Tensor | None,
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
        if keys is not None and rows is not None:
            inside = (keys[0, b, h, j] >= rows[0, b, h, i]) & (keys[1, b, h, j] < rows[1, b, h, i])
            score = torch.where(inside, score, -float("inf"))
        return score

    mask = BlockMask.from_kv_blocks(
        lists.partial_counts, lists.partial, lists.full_counts, lists.full, BLOCK_SIZE=block,
        mask_mod=seen, seq_lengths=(q.shape[2], k.shape[2]), compute_q_blocks=False,
    )  # fmt: skip
    options = {
        "score_mod": None if bias is None and rows is None else scored,
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
