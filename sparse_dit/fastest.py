"""Exact attention by whatever computes it fastest here, for the calls that a plan leaves dense.

What is at hand is tried in a layer's own calls: each kernel's first result is held against stock attention's,
and two calls of each are timed. From then on calls of that size go to the fastest.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .attend_call import attend_call
from .call import AttentionCall
from .index import dense_index
from .timing import Stopwatch

STOCK, FASTEST = "stock", "fastest"  # who computes calls that are dense
OWN = "sparse_dit's own kernel"
TRIES = 2  # timed calls of each, of which the better counts
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # of the norm, against stock
HALF_TOLERANCE = 2e-2

_Attend = Callable[[AttentionCall], Tensor]  # gives `[B, N, H, D]`


@dataclass(eq=False)
class _Trial:
    """What is known of one size.

    Args:
        tokens: Keys of a call.
        left: Kernels, each as often as it is still to be timed.
        seconds: The least that each took.
        sound: Those whose result was held against stock attention's.
    """

    tokens: int
    left: list[str]
    seconds: dict[str, float] = field(default_factory=dict)
    sound: set[str] = field(default_factory=set)
    best: str = STOCK


class Fastest:
    """Who computes exact attention; a copy tries anew.

    Args:
        tell: Called with a line of text if a kernel gave something else than stock attention.
        backend: `"auto"` or the backend of sparse attention that also computes these calls.
    """

    def __init__(self, tell: Callable[[str], None], backend: str = "auto") -> None:
        self._tell = tell
        self._backend = backend
        self._trials: dict[tuple[object, ...], _Trial] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        """Exact attention's output `[B, N, H, D]`, equal to stock attention's to rounding.

        Args:
            call: A call that `unsupported` and `split` say nothing of.
        """
        if torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v)):
            return call.stock()
        masked = call.rows is not None or call.kv_len is not None
        key = (call.q.shape, call.k.shape, call.v.shape, call.q.dtype, call.q.device, masked)
        trial = self._trials.get(key)
        if trial is None:
            trial = self._trials[key] = _Trial(
                call.k.shape[1], [STOCK, *self._kernels(call)] * TRIES
            )
        if not trial.left:
            return self._run(trial.best, call)
        return self._try(trial, call)

    @property
    def notes(self) -> tuple[str, ...]:
        """For each size what every kernel took."""
        found = []
        for trial in self._trials.values():
            if trial.left or len(trial.seconds) < 2:
                continue
            times = sorted(trial.seconds.items(), key=lambda item: item[1])
            text = ", ".join(f"{name} {1000 * seconds:.3g} ms" for name, seconds in times)
            found.append(f"dense calls over {trial.tokens:,} tokens by {trial.best}: {text}")
        return tuple(found)

    def _try(self, trial: _Trial, call: AttentionCall) -> Tensor:
        """The output by the kernel whose turn it is."""
        name = trial.left.pop(0)
        try:
            watch = Stopwatch()
            out = watch.run(lambda: self._run(name, call), call.q.device)
            seconds = watch.seconds
            if name != STOCK and name not in trial.sound:
                _check(out, call.stock())
                trial.sound.add(name)
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            if name == STOCK:
                raise
            trial.left = [other for other in trial.left if other != name]
            trial.seconds.pop(name, None)
            self._tell(f"dense calls don't run on {name}: {(str(error).splitlines() or [''])[0]}")
            return call.stock()
        trial.seconds[name] = min(seconds, trial.seconds.get(name, seconds))
        trial.best = min(trial.seconds, key=lambda other: trial.seconds[other])
        return out

    def _kernels(self, call: AttentionCall) -> list[str]:
        """Kernels other than stock attention that may run a call like this one."""
        plain = call.rows is None and call.kv_len is None and call.bias is None
        if not call.q.is_cuda or not plain or call.sinks is not None:
            return [OWN]
        packages = {name: package for name, (package, _) in PACKAGES.items()}
        return [OWN, *(n for n, p in packages.items() if importlib.util.find_spec(p) is not None)]

    def _run(self, name: str, call: AttentionCall) -> Tensor:
        if name == STOCK:
            return call.stock()
        if name != OWN:
            return PACKAGES[name][1](call)
        sizes = call.q.shape[2], call.q.shape[1], call.k.shape[1]
        index = dense_index(*sizes, call.q.device)  # the call's row intervals say the rest
        return attend_call(call, index, self._backend)[0]


def _check(out: Tensor, stock: Tensor) -> None:
    """Raise ValueError if a kernel's output isn't stock attention's, where that is finite."""
    allowed = TOLERANCE.get(stock.dtype, HALF_TOLERANCE)
    norm = stock.float().norm()
    error = (out.float() - stock.float()).norm()
    if norm.isfinite() and not error <= allowed * norm:
        raise ValueError(f"its result is {float(error / norm):.2g} of the norm away from stock's")


def _cudnn(call: AttentionCall) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, scale=call.scale, enable_gqa=grouped
        )
    return out.transpose(1, 2)


def _flash_attn(call: AttentionCall) -> Tensor:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func(call.q, call.k, call.v, softmax_scale=call.scale)


def _flash_attn_3(call: AttentionCall) -> Tensor:
    from flash_attn_interface import flash_attn_func  # pyright: ignore[reportMissingImports]

    out = flash_attn_func(call.q, call.k, call.v, softmax_scale=call.scale)
    return out[0] if isinstance(out, tuple) else out


def _xformers(call: AttentionCall) -> Tensor:
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    times = call.q.shape[2] // call.k.shape[2]
    k, v = (x.repeat_interleave(times, 2) if times > 1 else x for x in (call.k, call.v))
    return memory_efficient_attention(call.q, k, v, scale=call.scale)


PACKAGES: dict[str, tuple[str, _Attend]] = {  # on CUDA: what must be importable, and its call
    "cuDNN": ("torch", _cudnn),
    "flash-attn 3": ("flash_attn_interface", _flash_attn_3),
    "flash-attn 2": ("flash_attn", _flash_attn),
    "xformers": ("xformers", _xformers),
}
