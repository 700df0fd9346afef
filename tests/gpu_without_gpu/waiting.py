"""Operations that would wait for a device, refused: on tensors that only say they lie on one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gpu_without_gpu.pretended_device import DEVICE, tensors_in

READS = {  # whose result's shape or value the host has to know
    "aten::_local_scalar_dense", "aten::_unique2", "aten::bincount", "aten::equal", "aten::is_nonzero",
    "aten::item", "aten::masked_select", "aten::nonzero", "aten::unique_consecutive", "aten::unique_dim",
}  # fmt: skip
INDEXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"}


class NoWaits(TorchDispatchMode):
    """Inside, whatever would wait for `DEVICE` is a RuntimeError: reads, copies to and from it, masks."""

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, op._schema.name
        given = [*tensors_in(args), *tensors_in(kwargs)]
        there = any(x.device == DEVICE for x in given)
        if there and name in READS:
            raise RuntimeError(f"{name} waits for the device")
        if there and name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            raise RuntimeError(f"{name} waits for the device")
        if there and name in INDEXING:
            _check_indices(name, args[1])
        out = op(*args, **kwargs)
        devices = {x.device for x in (*given, *tensors_in((out,))) if x.dim() or x.device == DEVICE}
        if DEVICE in devices and len(devices) > 1:
            raise RuntimeError(f"{name} copies between {sorted(map(str, devices))}")
        return out


def _check_indices(name: str, indices: Any) -> None:
    for index in tensors_in(indices):
        if index.dtype in (torch.bool, torch.uint8) or index.device != DEVICE:
            raise RuntimeError(f"{name} by {index.dtype} on {index.device} waits for the device")


def not_read(self: Tensor) -> Any:
    """In the place of `Pretended.tolist`, which asks no mode."""
    raise RuntimeError("tolist waits for the device")
