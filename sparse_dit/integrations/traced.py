"""The seam as one opaque operator, so that a compiled block stays one graph.

`sparse_dit::seam` takes what the host hands to its attention function, and a tensor whose value names the
layer: a number would be a constant of the graph, which would then be compiled again for each layer. Plans,
steps and counters are Python that runs inside the operator; nothing of them is traced or guarded.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..autocast import lowered


class Layer(Protocol):
    """What the handle of an attention layer names."""

    def attend(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """What the host's attention function would return for these arguments."""
        ...


class Sorter(Protocol):
    """What the handle of a place where tokens are sorted names."""

    def sort(self, x: Tensor) -> Tensor:
        """The tensor with its tokens sorted, or as it is."""
        ...


_NAMED: WeakValueDictionary[int, Any] = WeakValueDictionary()
_NUMBERS = itertools.count()
# arguments of the host's attention function that the operator hands on
OPTIONS = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "backend")


def handle_of(named: Layer | Sorter) -> Tensor:
    """int64 `[]` on the CPU that names something in this process for as long as that lives."""
    number = next(_NUMBERS)
    _NAMED[number] = named
    return torch.tensor(number, device="cpu")


def traceable(options: dict[str, Any]) -> bool:
    """Whether the operator can hand on these arguments; other ones break the graph."""
    mask = options.get("attn_mask")
    return (mask is None or isinstance(mask, Tensor)) and all(
        name in OPTIONS or value is None for name, value in options.items()
    )


def attend_traced(
    handle: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: dict[str, Any],
    heads_first: bool,
) -> Tensor:
    """Call the operator with `traceable` options; output in the host's order of dimensions.

    What autocast casts is cast here: when a compiled graph runs, it is switched off.
    """
    backend, mask = options.get("backend"), options.get("attn_mask")
    q, k, v, *masks = lowered(q, k, v, *([] if mask is None else [mask]))
    return torch.ops.sparse_dit.seam(
        handle, q, k, v,
        masks[0] if masks else None,
        float(options.get("dropout_p") or 0.0),
        bool(options.get("is_causal")),
        options.get("scale"),
        bool(options.get("enable_gqa")),
        None if backend is None else str(getattr(backend, "value", backend)),
        heads_first,
    )  # fmt: skip


def _seam(
    handle: Tensor, q: Tensor, k: Tensor, v: Tensor,
    attn_mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None,
    enable_gqa: bool, backend: str | None, heads_first: bool,
) -> Tensor:  # fmt: skip
    layer: Layer = _named(handle)
    options = {
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    if backend is not None:
        options["backend"] = backend
    out = layer.attend((q, k, v), options)
    if out.is_set_to(v) or out.is_set_to(q):  # an operator's output is no input
        out = out.clone()
    if heads_first:  # hosts bring tokens first next, which then copies nothing
        return out.transpose(1, 2).contiguous().transpose(1, 2)
    return out.contiguous()


def _named(handle: Tensor) -> Any:
    named = _NAMED.get(int(handle))
    if named is None:
        raise RuntimeError(
            "a compiled block must run while its transformer exists, but that was deleted; "
            "compile the new one"
        )
    return named


def sort_traced(handle: Tensor, x: Tensor) -> Tensor:
    """Call the operator that sorts tokens as a `Sorter` says."""
    return torch.ops.sparse_dit.sort(handle, x)


def _sort(handle: Tensor, x: Tensor) -> Tensor:
    out = _named(handle).sort(x)
    return x.clone(memory_format=torch.contiguous_format) if out is x else out


def _fake_sort(handle: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_seam(
    handle: Tensor, q: Tensor, k: Tensor, v: Tensor,
    attn_mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None,
    enable_gqa: bool, backend: str | None, heads_first: bool,
) -> Tensor:  # fmt: skip
    batch, first, second, _ = q.shape
    if heads_first:
        return q.new_empty(batch, second, first, v.shape[-1]).transpose(1, 2)
    return q.new_empty(batch, first, second, v.shape[-1])


def _no_backward(ctx: Any, grad: Tensor) -> None:
    raise NotImplementedError(
        "compiled patched attention has no gradient; call it under torch.no_grad(), "
        "or take the patch off and compile again to train"
    )


# a captured CUDA graph would replay one step's choices for all
_TAGS = [t for t in (getattr(torch.Tag, "cudagraph_unsafe", None),) if t is not None]
OPERATOR = torch.library.Library("sparse_dit", "FRAGMENT")  # it lives as long as this does
OPERATOR.define(
    "seam(Tensor handle, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, "
    "bool is_causal, float? scale, bool enable_gqa, str? backend, bool heads_first) -> Tensor",
    tags=_TAGS,
)
OPERATOR.define("sort(Tensor handle, Tensor x) -> Tensor", tags=_TAGS)
for name, run, fake in (("seam", _seam, _fake_seam), ("sort", _sort, _fake_sort)):
    OPERATOR.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparse_dit::{name}", fake, lib=OPERATOR)
    torch.library.register_autograd(f"sparse_dit::{name}", _no_backward, lib=OPERATOR)
