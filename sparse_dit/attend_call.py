"""Sparse attention of a host's call, in the host's form."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attend_by, backend_name, sparse_attention
from .autocast import lowered, without_autocast
from .backends import triton
from .backends.attended import Attended
from .backends.triton.chosen import ChosenIndex
from .call import AttentionCall, with_bias
from .index import SparseIndex
from .intervals import RowIntervals
from .nan_guard import finite_or_dense


def attend_call(
    call: AttentionCall,
    index: SparseIndex | ChosenIndex,
    backend: str = "auto",
    nan_guard: bool = False,
) -> tuple[Tensor, str]:
    """Attention of a call over what an index names, `[B, N, H, D]`, and the backend that computed it.

    Args:
        call: A call that `unsupported` and `split` say nothing of.
        index: For its heads, queries and keys, on its device; one that was chosen there is Triton's.
        backend: `"auto"` or one that `sparse_attention` knows.
        nan_guard: See `sparse_attention`; not for calls with sinks.
    """
    if not nan_guard:
        name, found = attended_call(call, index, backend)
        return found.out, name
    q, k, v, scale = _as_given(call)
    if isinstance(index, ChosenIndex):
        out = _chosen(q, k, v, index, call, scale, None).out
        return _host_form(call, finite_or_dense(out, q, k, v, call.intervals, scale)), "triton"
    rows = call.intervals or RowIntervals()
    name = backend_name(q, index, backend, value_width=v.shape[-1])
    limits = {"row_start": rows.start, "row_stop": rows.stop, "scale": scale}
    out = sparse_attention(q, k, v, index, backend=name, nan_guard=True, **limits)
    return _host_form(call, out), name


def attended_call(
    call: AttentionCall,
    index: SparseIndex | ChosenIndex,
    backend: str,
    mass_block: int | None = None,
) -> tuple[str, Attended]:
    """The backend that computed a call's attention, and what it gave; its output is `[B, N, H, D]`.

    Args:
        call, index, backend: As for `attend_call`.
        mass_block: See `attend`.
    """
    q, k, v, scale = _as_given(call)
    if isinstance(index, ChosenIndex):
        found = _chosen(q, k, v, index, call, scale, mass_block)
        return "triton", found._replace(out=_host_form(call, found.out))
    rows, sinks = call.intervals or RowIntervals(), call.sinks
    name, found = attend_by(backend, q, k, v, index, rows, scale, sinks is not None, mass_block)
    out = found.out
    if sinks is not None:
        assert found.lse is not None, "it was asked for"
        share = torch.sigmoid(found.lse - sinks.float()[:, None])
        out = out * share[..., None].to(out.dtype)
    return name, found._replace(out=_host_form(call, out))


def _chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: ChosenIndex,
    call: AttentionCall,
    scale: float,
    mass_block: int | None,
) -> Attended:
    """What an index gives whose blocks were chosen on the device, for a call that Triton takes."""
    with without_autocast(q.device.type):
        return triton.forward(q, k, v, index, call.intervals, scale, False, mass_block)


def _as_given(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor, float]:
    """q, k, v `[B, H, N, D]` as the backends take them, a bias within them, and the factor of the logits."""
    q, k, v = lowered(call.q, call.k, call.v)
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    if call.bias is not None:
        q, k, v = with_bias(q, k, v, call.bias, scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return q, k, v, scale


def _host_form(call: AttentionCall, out: Tensor) -> Tensor:
    """`[B, N, H, D]` of an output, without what a bias added."""
    return (out if call.bias is None else out[..., : call.v.shape[-1]]).transpose(1, 2)
