"""Blocks that are chosen and laid out on a device without a wait for it; kernels are left out.

`test_pretended_device.py` runs this in a process of its own: torch learns of the device for good.
"""

import contextlib
from dataclasses import replace

import pytest
import torch

from sparse_dit.backends import triton
from sparse_dit.backends.triton import laid, launch
from sparse_dit.estimate import kept, on_device
from sparse_dit.estimate.orders import SAMPLED
from sparse_dit.patterns import Above, Antidiagonal, Dense, Pattern, Pooled, Share
from sparse_dit.runtime import Runtime
from tests.gpu_without_gpu.pretended_device import DEVICE, Pretended, PretendedDevice
from tests.gpu_without_gpu.waiting import NoWaits, not_read
from tests.test_online import HALF, MASS, OWN, POOLED, SMALL
from tests.test_reuse import call_at, component

SHARE = Share(0.6, 1)
PATTERNS = {
    "pooled": [POOLED, replace(POOLED, tile=(2, 2, 2)), Pattern(Dense())],
    "every step": [Pattern(Pooled(keep, local=1), tile=SMALL, far=True) for keep in (HALF, SHARE, Above())],
    "parts": [Pattern(Pooled(HALF, parts=2), tile=(1, 3, 3), sink_frames=1, far=True, pool=2)] * 3,
    "antidiagonal": [Pattern(Antidiagonal(keep, stride=3), tile=(1, 3, 3)) for keep in (HALF, HALF, SHARE)],
    "mass": [MASS, replace(MASS, shape=replace(MASS.shape, refresh=2, adaptive=True)), POOLED],
    "own order": [OWN] * 3,
    "taken again": [POOLED, replace(POOLED, every=2), replace(POOLED, every=2)],
}  # fmt: skip


class NoKernel:
    """A kernel that isn't launched."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None

    def __getattr__(self, name):
        return self


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """The Triton backend takes the device, and launches nothing."""
    monkeypatch.setattr(Pretended, "tolist", not_read)
    monkeypatch.setattr(Pretended, "data_ptr", lambda x: x.inner.data_ptr(), raising=False)
    monkeypatch.setattr(triton, "unsupported", lambda q, index: None)
    monkeypatch.setattr(triton, "on_device", lambda q: contextlib.nullcontext())
    monkeypatch.setattr(triton, "_architecture", lambda device: "sm90")
    for module in (laid, launch):
        monkeypatch.setattr(module, "kernel", NoKernel())
    monkeypatch.setattr("sparse_dit.attention.verdict", lambda *_: None)
    monkeypatch.setattr(on_device, "is_right", lambda *_: True)
    orders = {0: (SAMPLED, 0.0), 1: ((2, 2, 1), 0.0), 2: (SMALL, 0.0)}
    monkeypatch.setattr(kept, "best_orders", lambda *_: orders)
    with PretendedDevice():
        yield


def moved(step, seed):
    """A call whose tensors are on the device."""
    call = call_at(step, seed)
    there = {name: getattr(call, name).to(DEVICE) for name in ("q", "k", "v")}
    return replace(call, **there, stock=lambda: there["q"])


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS)
def test_a_call_waits_for_nothing(patterns):
    """After the first generation, in which what only depends on the layout is made."""
    runtime = Runtime("transformer", component(*patterns), "triton")
    for step in range(4):
        runtime(moved(step, step))
    before = [ran.calls for ran in runtime.ran]
    runtime._estimates._runs[0].kept.clear()
    calls = [moved(step, step + 10) for step in range(4)]
    with NoWaits():
        for call in calls:
            assert runtime(call).device == DEVICE
    assert sum(ran.calls for ran in runtime.ran) == 2 * sum(before)
    assert {ran.backend for ran in runtime.ran} - {None} == {"triton"}


def test_what_was_done_before_waited(monkeypatch):
    """The same calls, blocks chosen on the host: the mode sees it."""
    monkeypatch.setattr(kept, "takes", lambda *_: False)
    runtime = Runtime("transformer", component(*PATTERNS["pooled"]), "triton")
    runtime(moved(0, 0))
    call = moved(0, 1)
    with NoWaits(), pytest.raises(RuntimeError, match="copies between"):
        runtime(call)


SEEN = (
    "waits for|copies between|Could not run"  # the last: of lists, which this device can't be given
)
WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: torch.ones(3).to(DEVICE),
    "tensor": lambda x: torch.tensor([1, 2], device=DEVICE),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "list": lambda x: x[[0, 1]],
    "tolist": lambda x: x.tolist(),
    "repeat": lambda x: torch.repeat_interleave(x, x.long()),
    "bincount": lambda x: torch.bincount(x.long()),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_waits_are_seen(wait):
    x = torch.ones(3).to(DEVICE)
    with NoWaits(), pytest.raises(RuntimeError, match=SEEN):
        wait(x)


def test_what_does_not_wait_is_let_through():
    x = torch.ones(3).to(DEVICE)
    with NoWaits():
        y = (x + 1).sort().values[torch.arange(2, device=DEVICE)] * 3
        torch.full((), 7, device=DEVICE)
    assert torch.equal(y.cpu(), torch.full((2,), 6.0))
