"""Which forwards and rows are looked at; a call's sampled rows, and its attention over an index."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..attention import sparse_attention
from ..index import SparseIndex
from ..integrations.arrangement import with_bias
from ..integrations.call import AttentionCall, StepContext
from ..layout import TokenLayout
from .cells import SampledRows, sampled_rows


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Many small operations: waking other threads for each of them costs more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_turn(context: StepContext) -> bool:
    """Every other forward: one half of guidance at one step, the other half at the next.

    Forwards of a pipeline that has no halves are all in turn.
    """
    return context.branch in ("any", "uncond" if context.step % 2 else "cond")


def whole_layout(call: AttentionCall) -> TokenLayout | None:
    """The layout of a call over all of its tokens, some of them video, that asks for plain attention of a
    known noise level; None for any other call."""
    layout = call.context.layout
    if layout is None or call.context.sigma is None or call.unsupported is not None:
        return None
    whole = call.q.shape[1] == call.k.shape[1] == layout.seq_len
    return layout if whole and layout.num_video else None


def sampled_heads(
    call: AttentionCall,
    layout: TokenLayout,
    rows: Tensor,
    behind: Tensor | None,
    heads: Sequence[int] | None = None,
) -> Iterator[tuple[int, SampledRows]]:
    """The exact attention of sampled rows for each batch item and head: `(head, rows)`.

    Keys that are padding get nothing; a bias on the logits is part of queries and keys.

    Args:
        call: What the host computes.
        layout: Its sequence.
        rows: int64 `[R]`, sampled tokens.
        behind: `[H, D, D]` that values are multiplied by, see `projections`; None for heads' own outputs.
        heads: Which; None for all.
    """
    scale = call.scale if call.scale is not None else call.q.shape[-1] ** -0.5
    repeat = call.q.shape[2] // call.k.shape[2]
    for batch in range(call.q.shape[0]):
        valid = layout.seq_len if call.kv_len is None else int(call.kv_len[batch])
        q, k, v = (x[batch].detach().to("cpu") for x in (call.q, call.k, call.v))
        if call.bias is not None:
            bias = call.bias[None, batch].to("cpu", torch.float32)
            (q, k) = (
                x[0] for x in with_bias(q[None].float(), k[None].float(), v[None], bias, scale)[:2]
            )
        for head in range(q.shape[1]) if heads is None else heads:
            values = v[:, head // repeat]
            if behind is not None:
                values = values.float() @ behind[head]
            keys = k[:, head // repeat]
            yield head, sampled_rows(q[:, head], keys, values, rows, scale, valid)


def attention_over(call: AttentionCall, index: SparseIndex) -> Tensor:
    """Attention of a call over the index, `[B, N, H, D]`."""
    q, k, v = call.q, call.k, call.v
    scale = call.scale
    if call.bias is not None:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = with_bias(q, k, v, call.bias, scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = sparse_attention(q, k, v, index.to(q.device), kv_len=call.kv_len, scale=scale)
    return out[..., : call.v.shape[-1]].transpose(1, 2)
