"""Subclasses of the host's attention processors whose one attention call is redirected.

A processor's `__call__` makes q, k and v, calls one attention function and projects its output. The
subclass runs the same code with that one global rebound, so that nothing of the host is copied.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from torch import Tensor

from ..call import AttentionCall, Intercept, StepContext
from .arrangement import Arrangement
from .parallel import CONTEXT_PARALLELISM, split_of
from .traced import attend_traced, handle_of, traceable

DISPATCH = "dispatch_attention_fn"
SDPA = "scaled_dot_product_attention"
# positional order of both functions; the second has the first seven, the last two by keyword
PARAMETERS = (
    "query",
    "key",
    "value",
    "attn_mask",
    "dropout_p",
    "is_causal",
    "scale",
    "enable_gqa",
    "attention_kwargs",
)
HONOURED = {"attn_mask", "scale", "enable_gqa", "backend"}


@dataclass(slots=True)
class Tap:
    """What the layers of one attached transformer share.

    Args:
        intercept: Gets every self-attention call; None once detached: layers run stock.
        context: The noise level, branch, run and step of the present forward.
        arrangement: What the forward's arguments say of its layers' mask; None: read the mask.
        mask: The last mask that was read: the tensor, its version (the forward if torch tells none),
            valid keys, and why not.
        unpadded: Whether layers attend item by item, without the padding at the layout's end.
    """

    intercept: Intercept | None
    context: StepContext = field(default_factory=StepContext)
    arrangement: Arrangement | None = None
    mask: tuple[Tensor, int | StepContext, Tensor | None, str | None] | None = None
    unpadded: bool = False

    def read_mask(self, mask: Any, num_keys: int) -> tuple[Tensor | None, str | None]:
        """`(kv_len, why it is no prefix)`; read back from the device once a mask, not a layer."""
        if mask is None:
            return None, None
        if not isinstance(mask, Tensor):  # of compiled FlexAttention, say
            return None, f"a {type(mask).__name__}"
        version = self.context if mask.is_inference() else mask._version
        if not (self.mask and self.mask[0] is mask and self.mask[1] == version):
            self.mask = (mask, version, *_valid_prefix(mask, num_keys))
        return self.mask[2], self.mask[3]


@dataclass(eq=False)
class Seam:
    """One layer's entry to the tap; `image_only` if it sees the layout's image without the text.

    Compiled code knows it by its `handle`; `host` is set by `wrap`. A copy has its own of both.
    """

    layer: str
    tap: Tap
    image_only: bool = False

    def __post_init__(self) -> None:
        self.handle = handle_of(self)
        self.host: Host | None = None

    def __reduce__(self):
        return Seam, (self.layer, self.tap, self.image_only)

    def attend(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """What the host's attention function is replaced by."""
        assert self.host is not None, "wrap() sets it"
        return _attend(self, self.host, args, kwargs)

    @property
    def context(self) -> StepContext:
        """Where the present forward stands, with the layout of this layer."""
        context = self.tap.context
        if not self.image_only or context.layout is None:
            return context
        return replace(context, layout=context.layout.without_global())


@dataclass(frozen=True)
class Host:
    """A host's attention function, looked up when it is called, and its order of dimensions."""

    find: Callable[[], Callable[..., Tensor]]
    heads_first: bool


class _Active(threading.local):
    """The layer whose processor runs now in this thread; not there before the first call, and not read
    before it is written, as compiled code would guard what it found."""

    seam: Seam | None


_ACTIVE = _Active()


def wrap(stock: Any, seam: Seam) -> Any:
    """A processor that is `stock` but for its attention call, which goes to `seam.tap.intercept`.

    Both share their attributes: what the host sets on one (`_attention_backend`, weights) holds for both.

    Raises:
        TypeError: If `stock` calls no attention function that is known here.
    """
    processor = object.__new__(patched_class(type(stock)))
    seam.host = type(processor)._sparse_dit_host
    object.__setattr__(processor, "__dict__", vars(stock))
    object.__setattr__(processor, "_sparse_dit_stock", stock)
    object.__setattr__(processor, "_sparse_dit_seam", seam)
    return processor


@functools.cache
def patched_class(stock: type) -> type:
    """The subclass of a stock processor class that runs its code with attention redirected."""
    host = _host_of(stock)
    run = _rebound(stock, host)

    @functools.wraps(stock.__call__)  # hosts drop keyword arguments that the signature lacks
    def __call__(self, *args, **kwargs):
        _ACTIVE.seam = self._sparse_dit_seam
        try:
            return run(self, *args, **kwargs)
        finally:
            _ACTIVE.seam = None  # no processor runs within another

    def __new__(cls, *args, **kwargs):  # hosts reset a processor by calling its class
        return stock(*args, **kwargs)

    def __reduce__(self):
        return wrap, (self._sparse_dit_stock, self._sparse_dit_seam)

    body = {
        "__slots__": ("_sparse_dit_seam", "_sparse_dit_stock"),
        "__new__": __new__,
        "__call__": __call__,
        "__reduce__": __reduce__,
        "_sparse_dit_host": host,
        "__doc__": stock.__doc__,
        "__module__": __name__,
    }
    patched = type(f"SparseDiT{stock.__name__}", (stock,), body)
    registry = AttentionProcessorRegistry  # the host asks it by the very class
    registry._register()
    if stock in registry._registry:
        registry.register(patched, registry.get(stock))
    return patched


def _host_of(stock: type) -> Host:
    call: Any = stock.__call__
    names = call.__code__.co_names if inspect.isfunction(call) else ()
    scope = getattr(call, "__globals__", {})
    if DISPATCH in names and DISPATCH in scope:
        return Host(lambda: scope[DISPATCH], heads_first=False)
    if SDPA in names and scope.get("F") is F:
        return Host(lambda: F.scaled_dot_product_attention, heads_first=True)
    raise TypeError(
        f"{stock.__name__} calls no attention function that sparse_dit knows "
        f"({DISPATCH} or F.{SDPA})"
    )


def _rebound(stock: type, host: Host) -> Callable[..., Any]:
    call: Any = stock.__call__
    attention = _redirect(host)
    if host.heads_first:
        module = types.ModuleType(F.__name__, "torch.nn.functional with attention redirected")
        vars(module).update(vars(F))
        vars(module)[SDPA] = attention
        ours = {"F": module}
    else:
        ours = {DISPATCH: attention}
    scope = {**call.__globals__, **ours}
    # torch.compile would take a named scope for the module of that name, and guard the host's function
    scope.pop("__name__", None)
    run = types.FunctionType(
        call.__code__, scope, call.__name__, call.__defaults__, call.__closure__
    )
    run.__kwdefaults__ = call.__kwdefaults__
    return run


def _redirect(host: Host) -> Callable[..., Tensor]:
    """A stand-in for the host's attention function."""

    def attention(*args, **kwargs):
        seam = _ACTIVE.seam
        assert seam is not None, "a patched processor sets its seam before it runs"
        if not torch.compiler.is_compiling():
            return _attend(seam, host, args, kwargs)
        options = {**dict(zip(PARAMETERS, args, strict=False)), **kwargs}
        q, k, v = options.pop("query"), options.pop("key"), options.pop("value")
        if traceable(options):
            return attend_traced(seam.handle, q, k, v, options, host.heads_first)
        return _attend_untraced(seam, host, args, kwargs)

    return attention


def _attend(seam: Seam, host: Host, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    tap, heads_first = seam.tap, host.heads_first
    options: dict[str, Any] = {**dict(zip(PARAMETERS, args, strict=False)), **kwargs}
    q, k, v = (options.pop(name) for name in PARAMETERS[:3])
    if heads_first:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    arrangement = tap.arrangement
    widened = arrangement is not None and arrangement.widens(q, k)
    if tap.intercept is None or (q.shape[1] != k.shape[1] and not widened):
        return host.find()(*args, **kwargs)  # keys of an image adapter, say

    mask = options.get("attn_mask")
    unsupported = _unsupported(options)
    kv_len = bias = split = None
    scale, context = options.get("scale"), seam.context
    if tap.unpadded and context.layout is not None:
        context = replace(context, layout=context.layout.cut(q.shape[1]))
    if unsupported == CONTEXT_PARALLELISM:
        if arrangement is None:
            split, unsupported = split_of(options["parallel_config"], context.layout, q, k, mask)
        arrangement = None
    elif arrangement is not None and not arrangement.fits(q):
        arrangement, unsupported = None, unsupported or "a mask of other tokens than the forward's"
    elif arrangement is not None:
        q, k, v = arrangement.arrange_queries(q), arrangement.arrange(k), arrangement.arrange(v)
        kv_len, bias = (arrangement.kv_len, arrangement.bias) if mask is not None else (None, None)
    elif unsupported is None:
        kv_len, unsupported = tap.read_mask(mask, k.shape[1])
    stock = functools.partial(_stock, host, args, kwargs, arrangement)
    out = tap.intercept(
        AttentionCall(
            seam.layer, q, k, v, mask, kv_len, scale, context, unsupported, stock, bias, split
        )
    )
    out = arrangement.restore(out) if arrangement else out
    return out.transpose(1, 2) if heads_first else out


def _stock(
    host: Host, args: tuple, kwargs: dict[str, Any], arrangement: Arrangement | None
) -> Tensor:
    out = host.find()(*args, **kwargs)
    out = out.transpose(1, 2) if host.heads_first else out
    return arrangement.arrange_queries(out) if arrangement else out


# a compiled block breaks its graph here, if the host asks for what the operator can't hand on
_attend_untraced: Any = torch.compiler.disable(_attend)


def _unsupported(options: dict[str, Any]) -> str | None:
    if options.get("dropout_p"):
        return f"attention dropout ({options['dropout_p']})"
    if options.get("is_causal"):
        return "a causal mask"
    if options.get("attention_kwargs"):
        return f"attention_kwargs {sorted(options['attention_kwargs'])}"
    if torch._C._len_torch_function_stack() and any(
        isinstance(mode, AttentionScoreSkipFunctionMode)
        for mode in torch.overrides._get_current_function_mode_stack()
    ):
        return "skipped attention scores"
    unknown = options.keys() - HONOURED - set(PARAMETERS) - {"parallel_config"}
    if unknown:
        return f"arguments {sorted(unknown)} of the host"
    return None if options.get("parallel_config") is None else CONTEXT_PARALLELISM


def _valid_prefix(mask: Tensor, num_keys: int) -> tuple[Tensor | None, str | None]:
    if mask.dtype != torch.bool or mask.shape != (mask.shape[0], *[1] * (mask.ndim - 2), num_keys):
        return None, f"a dense mask {tuple(mask.shape)} of {mask.dtype}"
    valid = mask.reshape(mask.shape[0], num_keys)
    kv_len = valid.sum(1)
    holes = (valid[:, 1:] & ~valid[:, :-1]).any()
    shortest, has_holes = torch.stack([kv_len.amin(), holes.long()]).tolist()
    if has_holes or not shortest:
        return None, "a mask whose valid keys are not the first ones"
    return (None if shortest == num_keys else kv_len), None
