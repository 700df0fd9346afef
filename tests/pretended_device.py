"""Tensors that lie on the CPU and say they are on a GPU, so that mixing devices fails here as it does there.

What computes with torch alone (the gather backend, indices, lists for others) runs on them as it is. As on a
GPU, an operation must not take tensors of both kinds, but for scalars; indices may lie on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda", 0)
MAY_MIX = (
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten._index_put_impl_.default,
    torch.ops.aten.index_put_.default,
)


class Pretended(Tensor):
    """A tensor that says it is on `DEVICE`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        mine = [x for x in given if isinstance(x, Pretended)]
        strange = [x for x in given if not isinstance(x, Pretended) and x.dim() > 0]
        if strange and op not in MAY_MIX:
            raise RuntimeError(f"{op}: Expected all tensors to be on the same device, cuda:0 and cpu")
        there = bool(mine)
        if (wanted := kwargs.get("device")) is not None:
            there = torch.device(wanted).type == "cuda"
            kwargs["device"] = torch.device("cpu")
        plain = tree_map(_inner, (args, kwargs))
        out = op(*plain[0], **plain[1])
        if op is torch.ops.aten.copy_.default or op._schema.is_mutable and given:
            return args[0]
        return tree_map(lambda x: Pretended(x) if isinstance(x, Tensor) and there else x, out)


def pretended(x: Tensor) -> Tensor:
    """The same numbers on the device that isn't there."""
    return Pretended(x)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, Pretended) else x
