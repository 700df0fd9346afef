"""Attach to the self-attention of a model of transformers, whoever wants to see or replace it."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...call import Intercept, StepContext
from .canvases import Canvases, sees_both_ways
from .media import Media
from .registered import NAMES, SEAM, Seam, Tap, register

logger = logging.getLogger("sparse_dit")

COMPONENT = "model"


def components(model: Any) -> dict[str, nn.Module]:
    """`{"model": it}` of a model, or of a pipeline of transformers that holds one."""
    kind = type(model).__name__
    if isinstance(model, type):
        raise TypeError(
            f"{model.__name__} is a class; pass a model of it, as "
            f"{model.__name__}.from_pretrained(...) gives"
        )
    found = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    found = getattr(found, "_orig_mod", found)  # where torch.compile keeps the module itself
    if not isinstance(found, PreTrainedModel):
        raise TypeError(f"{kind} is no model of transformers and no pipeline with one")
    if not self_attention_layers(found):
        raise NotImplementedError(
            f"{type(found).__name__} can't be patched: none of its layers calls its attention through "
            "transformers' AttentionInterface"
        )
    return {COMPONENT: found}


def self_attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The text model's attention layers that call transformers' attention interface, by exact module path.

    Vision and audio towers keep stock attention: their calls are small.
    """
    text = _text_config(model)
    return {
        path: module
        for path, module in model.named_modules()
        if _calls_the_interface(type(module))
        and getattr(module, "layer_idx", None) is not None
        and _is_text(getattr(module, "config", None), text)
        and not getattr(module, "is_cross_attention", False)
    }


def denoising_layers(model: Any) -> list[str]:
    """The layers of a diffusion language model that see both ways, for it or its pipeline; none of others."""
    (found,) = components(model).values()
    if Canvases.of(found, model) is None:
        return []
    return [path for path, one in self_attention_layers(found).items() if sees_both_ways(one)]


def heads_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """`(num_heads, head_dim)` of each of a model's self-attention layers; head_dim is that of q and k."""
    return {path: _heads(module) for path, module in self_attention_layers(model).items()}


def attach(model: nn.Module, intercept: Intercept, pipe: Any = None) -> Attachment:
    """Send every self-attention call of a model to `intercept`; see `integrations.attach`."""
    (found,) = components(model).values()
    if attachment_of(found) is not None:
        raise ValueError(
            f"something is attached to this {type(found).__name__} already; "
            "detach it first (handle.remove() or sparse_dit.unpatch(model))"
        )
    return Attachment(found, intercept, pipe)


def attachment_of(model: nn.Module) -> Attachment | None:
    """What is attached to a model."""
    return vars(model).get(Attachment.KEY)


class Attachment:
    """A model's seams, its config's switched name, and the hooks that tell where a forward stands.

    It belongs to the model: copied and pickled with it, and no part of its state dict or `config.json`.
    """

    KEY = "_sparse_dit"

    def __init__(self, model: nn.Module, intercept: Intercept, pipe: Any = None) -> None:
        self._model = model
        canvases = Canvases.of(model, pipe)
        self._tap = Tap(intercept, media=Media.of(model), canvases=canvases)
        self.layers: dict[str, Any] = self_attention_layers(model)
        configs = {id(m.config): m.config for m in self.layers.values()}
        self._configs = [(config, _stock_name(config, model)) for config in configs.values()]
        self._lost: set[str] = set()
        register()
        for path, module in self.layers.items():
            stock = _stock_name(module.config, model)
            setattr(module, SEAM, Seam(path, self._tap, module, stock))
        for config, stock in self._configs:
            config._attn_implementation_internal = NAMES[stock]
        self._hooks = [model.register_forward_pre_hook(self._before_forward)]
        if self._tap.media is not None:
            self._hooks += self._tap.media.watch(model)
        if canvases is not None:
            both_ways = [path for path, module in self.layers.items() if sees_both_ways(module)]
            self._hooks += canvases.watch(model, both_ways)
        setattr(model, self.KEY, self)

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
        """Layers that were replaced while attached, or whose attention implementation was: they run stock."""
        if self._tap.intercept is None:
            return sorted(self._lost)
        return sorted(path for path, module in self.layers.items() if self._is_lost(path, module))

    @property
    def replaced(self) -> bool:
        """Never: the model itself is what is patched."""
        return False

    def begin_run(self) -> None:
        """Nothing is carried from one forward to another."""

    def detach(self) -> None:
        """Restore the stock implementations and take the seams off; twice is harmless."""
        if self._tap.intercept is None:
            return
        self._lost = set(self.lost)
        for config, stock in self._configs:
            if config._attn_implementation == NAMES[stock]:
                config._attn_implementation_internal = stock
        for module in self.layers.values():
            vars(module).pop(SEAM, None)
        for hook in self._hooks:
            hook.remove()
        delattr(self._model, self.KEY)
        self._tap.intercept = self._tap.decode = None
        self._tap.begin()

    def _is_lost(self, path: str, module: Any) -> bool:
        try:
            there = self._model.get_submodule(path)
        except AttributeError:  # nothing is there, in a cut model
            return False
        ours = module.config._attn_implementation in NAMES.values()
        return there is not module or SEAM not in vars(module) or not ours

    def _before_forward(self, model: nn.Module, args: tuple) -> None:
        # in a compiled forward each call has a mask object of its own
        if not torch.compiler.is_compiling():
            self._tap.begin()


def _stock_name(config: Any, model: nn.Module) -> str:
    stock = config._attn_implementation
    if stock not in NAMES:
        raise NotImplementedError(
            f"{type(model).__name__} was loaded with attn_implementation={stock!r}, whose place sparse_dit "
            f"doesn't take; load it with one of {sorted(NAMES)}"
        )
    return stock


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _is_text(config: Any, text: Any) -> bool:
    return config is text or (config is not None and type(config) is type(text))


def _calls_the_interface(kind: type) -> bool:
    """Whether a module's class calls what `AttentionInterface` holds, by the names in its forward."""
    forward: Any = inspect.unwrap(kind.forward)
    code = getattr(forward, "__code__", None)
    names = {"get_interface", "ALL_ATTENTION_FUNCTIONS"}  # remote code has the second alone
    return code is not None and not names.isdisjoint(code.co_names)


def _heads(module: Any) -> tuple[int, int]:
    config = module.config
    num_heads = getattr(module, "num_heads", None) or config.num_attention_heads
    for name in ("qk_head_dim", "head_dim", "attention_head_size"):
        if isinstance(found := getattr(module, name, None), int):
            return num_heads, found
    return num_heads, config.hidden_size // num_heads
