"""Attach to the self-attention of a diffusers transformer, whoever wants to see or replace it."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..call import Intercept, StepContext
from ..layout import Tile
from ..step_cache import StepCache
from .families import Family, family_of, forward_arguments, sigma_of
from .families.unqualified import UNQUALIFIED
from .parallel import check_split
from .processors import Seam, Tap, wrap
from .schedule import Schedule, steps_of
from .step_caches import (
    cache_config,
    disable_step_cache,
    enable_step_cache,
    enabled_step_cache,
    reset_step_cache,
)
from .step_tracker import StepTracker
from .token_order import TokenOrder

logger = logging.getLogger("sparse_dit")

# attention layers that project the outputs of the layout's tokens by another module than `to_out`
OF_VIDEO = {"Cosmos3PackedMoTAttention": "to_add_out"}
# the last two are MiniMax-H3's and Ideogram 4's
COMPONENTS = ("transformer", "transformer_2", "transformer_ref", "unconditional_transformer")


def components(pipe_or_transformer: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline by component name; a bare one is `{"transformer": it}`."""
    supported = "`sparse-dit models` lists the transformers that are"
    kind = type(pipe_or_transformer).__name__
    if isinstance(pipe_or_transformer, type):
        raise TypeError(
            f"{pipe_or_transformer.__name__} is a class; pass a pipeline or transformer of it, as "
            f"{pipe_or_transformer.__name__}.from_pretrained(...) gives"
        )
    if isinstance(pipe_or_transformer, nn.Module):
        found = {"transformer": pipe_or_transformer}
    else:
        parts = getattr(pipe_or_transformer, "components", {})
        found = {name: parts[name] for name in COMPONENTS if parts.get(name) is not None}
    if not found:
        raise TypeError(
            f"{kind} is no transformer and no pipeline with one; pass a diffusers pipeline"
        )
    # torch.compile(module) keeps the module itself here
    found = {name: getattr(part, "_orig_mod", part) for name, part in found.items()}
    for name, part in found.items():
        if family_of(part) is None:
            what = type(part).__name__
            if part is not pipe_or_transformer:
                what = f"{kind}.{name}, a {what},"
            reason = UNQUALIFIED.get(type(part).__name__)
            raise NotImplementedError(
                f"{what} can't be patched: {reason}"
                if reason
                else f"{what} is not supported; {supported}, "
                "sparse_dit.add_model makes another class known"
            )
    return found


def self_attention_layers(transformer: nn.Module) -> dict[str, nn.Module]:
    """Attention layers whose queries and keys are the layout's tokens, by exact module path."""
    (transformer,) = components(transformer).values()
    pattern = re.compile(_family(transformer).layers)
    return {name: module for name, module in transformer.named_modules() if pattern.fullmatch(name)}


def image_only_layers(transformer: nn.Module) -> set[str]:
    """Those of its self-attention layers that see the video or image without the text, by module path."""
    (transformer,) = components(transformer).values()
    image_only = re.compile(_family(transformer).image_only or r"(?!)").fullmatch
    return {name for name in self_attention_layers(transformer) if image_only(name)}


def heads_of(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """`(num_heads, head_dim)` of each of a transformer's self-attention layers, by exact module path."""
    (transformer,) = components(transformer).values()
    found = _family(transformer).heads(transformer.config)
    layers = self_attention_layers(transformer)
    return {layer: found[layer] if isinstance(found, Mapping) else found for layer in layers}


def output_projection(layer: nn.Module) -> nn.Module | None:
    """A layer's output projection, in the usual place; None in blocks that project it with their MLP."""
    out: Any = getattr(layer, OF_VIDEO.get(type(layer).__name__, "to_out"), None)
    if isinstance(out, nn.Identity):  # Lumina-Next projects them together with cross-attention's
        return None
    return out[0] if isinstance(out, nn.ModuleList | nn.Sequential) and len(out) else out


def attach(transformer: nn.Module, intercept: Intercept, pipe: Any = None) -> Attachment:
    """Send every self-attention call of a transformer to `intercept`; see `integrations.attach`.

    Norms, rotary embedding and projections stay the host's. The scheduler of `pipe` tells where generations
    and steps begin; without a pipeline they are guessed from noise levels and conditions.
    """
    (transformer,) = components(transformer).values()
    if attachment_of(transformer) is not None:
        raise ValueError(
            f"something is attached to this {type(transformer).__name__} already; "
            "detach it first (handle.remove() or sparse_dit.unpatch(pipe))"
        )
    return Attachment(transformer, intercept, None if isinstance(pipe, nn.Module) else pipe)


def attachment_of(transformer: nn.Module) -> Attachment | None:
    """What is attached to a transformer."""
    return vars(transformer).get(Attachment.KEY)


class Attachment:
    """A transformer's patched processors and the hook that tracks its forwards.

    It belongs to the transformer: copied and pickled with it, and no part of its state dict.
    `layers` are the attached attention layers by module path.

    The hook is torch's own (not one of diffusers' `HookRegistry`), which copies with the module and
    which offloading and cache hooks, all of them wrappers of `forward`, neither see nor drop.
    """

    KEY = "_sparse_dit"

    def __init__(self, transformer: nn.Module, intercept: Intercept, pipe: Any = None) -> None:
        self._tap = Tap(intercept, unpadded=_family(transformer).unpadded)
        self._transformer: Any = transformer
        self.layers: dict[str, Any] = dict(self_attention_layers(transformer))
        self._stock = {n: m.processor for n, m in self.layers.items()}
        image_only = image_only_layers(transformer)
        self._patched = {
            n: wrap(p, Seam(n, self._tap, n in image_only)) for n, p in self._stock.items()
        }
        self._links = _links(transformer, self.layers)
        self._num_heads = {num_heads for num_heads, _ in heads_of(transformer).values()}
        self._name: str | None = None
        self._enter_again: Callable[[], object] | None = None  # the cache context that is entered
        self._schedule = Schedule(pipe)
        self._tracker = StepTracker(self._schedule)
        self._lost: set[str] = set()
        self._was_replaced = False
        self._token_order: TokenOrder | None = None
        self._cache_config: object = None  # of the step cache that was enabled with the patch
        self._last_cache: StepCache | str | None = None
        try:
            for name, processor in self._patched.items():
                _set(self.layers[name], processor)
        except BaseException:
            for name, processor in self._stock.items():
                if self.layers[name].processor is not processor:
                    _set(self.layers[name], processor)
            raise
        hook = self._before_forward  # pyright: ignore[reportAttributeAccessIssue]
        self._hook = transformer.register_forward_pre_hook(hook, with_kwargs=True)
        if hasattr(transformer, "cache_context"):
            self._transformer.cache_context = self._cache_context  # on this instance alone
        setattr(transformer, self.KEY, self)

    @property
    def context(self) -> StepContext:
        """Where the last forward stood."""
        return self._tap.context

    @property
    def intercept(self) -> Intercept | None:
        """What gets the calls; None once detached."""
        return self._tap.intercept

    @property
    def lost(self) -> list[str]:
        """Layers that were replaced while attached, or whose processor was: they run stock attention."""
        if self._tap.intercept is None:
            return sorted(self._lost)
        return sorted(n for n, p in self._patched.items() if self._replaced(n, p))

    @property
    def replaced(self) -> bool:
        """Whether the pipeline had another transformer in this one's place while attached."""
        pipe = self._schedule.pipe
        if self._tap.intercept is None or pipe is None:
            return self._was_replaced
        parts = (getattr(part, "_orig_mod", part) for part in pipe.components.values())
        return all(part is not self._transformer for part in parts)

    def enable_step_cache(self, cache: StepCache) -> None:
        """Enable a step cache until detached; one that the host has enabled already stays."""
        if cache_config(self._transformer) is None:
            self._cache_config = enable_step_cache(self._transformer, cache)

    @property
    def step_cache(self) -> StepCache | str | None:
        """The step cache that is enabled, by whomever; of an unknown one what it is called."""
        if self._tap.intercept is None:
            return self._last_cache
        return enabled_step_cache(self._transformer)

    @property
    def steps(self) -> int | None:
        """Steps of the generation that the pipeline is in, or was in last; None if that isn't known."""
        return steps_of(self._schedule.pipe)

    def sort_tokens(self, tile: Tile | str) -> None:
        """Sort tokens once a forward until detached, or note why not; see `host.Sorting`."""
        self._token_order = TokenOrder(self._transformer, tile)

    @property
    def token_order(self) -> tuple[str, ...]:
        """In which forwards tokens were sorted, and in which not, and why; nothing if it wasn't asked for."""
        return () if self._token_order is None else self._token_order.notes

    def begin_run(self) -> None:
        """Let the next forward begin a generation; see `Handle.begin_run`."""
        self._tracker.begin()

    def detach(self) -> None:
        """Restore the very stock processors and take the hook off; twice is harmless."""
        if self._tap.intercept is None:
            return
        self._lost, self._was_replaced = set(self.lost), self.replaced
        for name, layer in self.layers.items():
            if layer.processor is self._patched[name]:
                _set(layer, self._stock[name])
        self._last_cache = enabled_step_cache(self._transformer)
        disable_step_cache(self._transformer, self._cache_config)
        self._hook.remove()
        if self._token_order is not None:
            self._token_order.detach()
        vars(self._transformer).pop("cache_context", None)
        delattr(self._transformer, self.KEY)
        self._tap.intercept = None  # a processor that the host kept runs stock from now on
        self._tap.mask = self._tap.arrangement = None
        self._tracker = StepTracker()  # it holds tensors

    def _untouched(self) -> bool:
        """Whether every layer is where it was, with our processor."""
        return all(parent.get(name) is child for parent, name, child in self._links) and all(
            self.layers[name].processor is processor for name, processor in self._patched.items()
        )

    def _replaced(self, name: str, processor: Any) -> bool:
        """Whether another layer or processor is at this path now; nothing may be, in a cut model."""
        try:
            layer = self._transformer.get_submodule(name)
        except AttributeError:
            return False
        return getattr(layer, "processor", None) is not processor

    @contextlib.contextmanager
    def _cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """`transformer.cache_context`, from which the pipeline tells the guidance branch."""
        enter = functools.partial(
            type(self._transformer).cache_context, self._transformer, name, **kwargs
        )
        previous = self._name, self._enter_again
        with contextlib.ExitStack() as entered:
            self._name = name
            self._enter_again = lambda: entered.enter_context(enter())
            try:
                self._enter_again()
                yield
            finally:
                self._name, self._enter_again = previous

    def _forget_interrupted(self) -> None:
        """Let the patch's step cache forget a generation that was cut off: only one that ends does so."""
        if self._cache_config is None or cache_config(self._transformer) is not self._cache_config:
            return
        reset_step_cache(self._transformer)
        if self._enter_again is not None:  # the context is forgotten too
            self._enter_again()

    @torch.compiler.disable
    def _before_forward(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._report_lost()
        family = _family(transformer)
        arguments = forward_arguments(transformer, args, kwargs)
        sigma = sigma_of(family, transformer.config, arguments)
        branch, run, step = self._tracker.advance(
            self._tap.context, family, arguments, sigma, self._name
        )
        arrangement = family.arrange(transformer.config, arguments) if family.arrange else None
        layout = arrangement.layout if arrangement else family.layout(transformer.config, arguments)
        check_split(transformer, layout, self._num_heads, arguments)
        condition = self._tracker.condition(arguments)
        if run != self._tap.context.run:
            self._forget_interrupted()
        self._tap.arrangement, sorted_by = arrangement, None
        if self._token_order is not None:
            own = family.layout(transformer.config, arguments) if arrangement else layout
            found = self._token_order.begin_forward(own, arguments, args, kwargs)
            sorted_by, args, kwargs = found
        self._tap.context = StepContext(
            layout, sigma, branch, run, step, condition, sorted_by=sorted_by
        )
        return None if self._token_order is None else (args, kwargs)

    def _report_lost(self) -> None:
        if not self._lost and self._untouched():  # the usual case, at a microsecond a layer
            return
        lost = set(self.lost)
        if lost - self._lost:
            logger.error(
                "the attention processors of %d layers were replaced after patching "
                "(fuse_qkv_projections? an IP adapter? other blocks?) and run stock: "
                "do that first, then patch; %s",
                len(lost),
                sorted(lost),
            )
        self._lost = lost


def _links(root: nn.Module, layers: dict[str, Any]) -> list[tuple[dict[str, Any], str, nn.Module]]:
    """Which module holds which on the way to the layers: `(modules of the holder, name, module)`."""
    links = {}
    for path in layers:
        parent: Any = root
        for name in path.split("."):
            child = parent._modules[name]
            links[id(parent), name] = (parent._modules, name, child)
            parent = child
    return list(links.values())


def _set(layer: Any, processor: Any) -> None:
    if hasattr(layer, "set_processor"):
        layer.set_processor(processor)
    else:  # Mochi's attention has no setter
        layer.processor = processor


def _family(transformer: nn.Module) -> Family:
    family = family_of(transformer)
    assert family is not None, "components() lets no other class through"
    return family
