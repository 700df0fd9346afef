"""Tensors that lie on the CPU and say they don't, so that mixing devices fails here as it does with a GPU.

What computes with torch alone (the gather backend, indices, lists for others) runs on them as it is. An
operation must not take tensors of both kinds, but for scalars and indices. Torch learns of the device when
this is imported, for good: only a process of its own should (`test_pretended_device.py` starts one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretended")
DEVICE = torch.device("pretended", 0)
MAY_MIX = {
    "aten::_to_copy",
    "aten::copy_",
    "aten::index",
    "aten::index_put_",
    "aten::_index_put_impl_",
}


class Pretended(Tensor):
    """A tensor that says it is on `DEVICE`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            inner.stride(),
            inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _run(op, args, kwargs or {})

    def tolist(self) -> Any:
        return self.inner.tolist()


class PretendedDevice(TorchDispatchMode):
    """Inside, `device=DEVICE` makes such tensors too."""

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _run(op, args, kwargs or {})


def _run(op: Any, args: tuple, kwargs: dict) -> Any:
    given = [*tensors_in(args), *tensors_in(kwargs)]
    there = any(isinstance(x, Pretended) for x in given)
    strange = any(not isinstance(x, Pretended) and x.dim() > 0 for x in given)
    if there and strange and op._schema.name not in MAY_MIX:
        raise RuntimeError(f"{op}: all tensors must be on the same device, got {DEVICE} and cpu")
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = op(*_each(_inner, args), **_each(_inner, kwargs))
    same = {id(_inner(x)): x for x in given}  # what was written in place comes back as itself
    return _each(lambda x: same.get(id(x), Pretended(x) if there else x), out)


def _inner(x: Tensor) -> Tensor:
    return x.inner if isinstance(x, Pretended) else x


def tensors_in(x: Any) -> Iterator[Tensor]:
    """Those in lists, tuples and dicts; PyTorch's own functions for it take most of the time here."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple | dict):
        for part in x.values() if isinstance(x, dict) else x:
            yield from tensors_in(part)


def _each(change: Callable[[Tensor], Tensor], x: Any) -> Any:
    """The same with every tensor changed."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, dict):
        return {name: _each(change, part) for name, part in x.items()}
    return type(x)([_each(change, part) for part in x]) if isinstance(x, list | tuple) else x
