"""The libraries whose models are patched and searched, one module each; nothing else here knows them.

What a module must have is written in `host.py`. One more library is such a module and a line in `HOSTS`.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import nn

from ..call import Intercept
from ..generation import GenerationSettings
from .host import Attachment, Caching, Host, Seen, Sorting, Workload

__all__ = [
    "HOSTS",
    "Attachment",
    "Caching",
    "Host",
    "Seen",
    "Sorting",
    "Workload",
    "attach",
    "attached",
    "attachment_of",
    "components",
    "heads_of",
    "host_named",
    "host_of",
    "library_of",
    "self_attention_layers",
    "unpatched",
    "workload",
]

# top-level package of a model's class -> the module that knows it, imported when it is first needed
HOSTS: dict[str, str] = {
    "diffusers": "sparse_dit.integrations.diffusers",
    "transformers": "sparse_dit.integrations.transformers",
}
OTHERS = (
    "diffusers"  # host of classes that are of none: people's own, which `add_model` makes known
)


def host_named(name: str) -> Host:
    """The host of a library that `HOSTS` names."""
    return cast(Host, importlib.import_module(HOSTS[name]))


def library_of(model: Any) -> str:
    """The library of a model, or of a pipeline's model, by the package of its class or of a base of it."""
    if isinstance(model, nn.Module):
        model = getattr(model, "_orig_mod", model)  # where torch.compile keeps the module itself
    elif isinstance(inner := getattr(model, "model", None), nn.Module):
        return library_of(inner)  # as pipelines of diffusers for language models
    packages = (cls.__module__.partition(".")[0] for cls in type(model).__mro__)
    return next((name for name in packages if name in HOSTS), OTHERS)


def host_of(model: Any) -> Host:
    """The host of a model or pipeline."""
    return host_named(library_of(model))


def components(model: Any) -> dict[str, nn.Module]:
    """The modules of a pipeline whose attention can be patched, by name; a bare one is its only component.

    Raises:
        TypeError: If there is none, or it is a class.
        NotImplementedError: If there is one of a class that is not supported.
    """
    return host_of(model).components(model)


def unpatched(model: Any) -> dict[str, nn.Module]:
    """The components of a model that runs stock, by name.

    Raises:
        ValueError: If it is patched.
        TypeError, NotImplementedError: See `components`.
    """
    found = components(model)
    if any(attachment_of(module) is not None for module in found.values()):
        raise ValueError(
            "the pipeline is patched; call handle.remove() or sparse_dit.unpatch(pipe) first"
        )
    return found


def self_attention_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The attention layers of a component whose queries and keys are the layout's tokens, by module path."""
    return host_of(module).self_attention_layers(module)


def heads_of(module: nn.Module) -> dict[str, tuple[int, int]]:
    """`(num_heads, head_dim)` of each of a component's self-attention layers, by module path."""
    return host_of(module).heads_of(module)


def attach(module: nn.Module, intercept: Intercept, pipe: Any = None) -> Attachment:
    """Send every self-attention call of a component to `intercept`, until detached.

    It is bit-equal to stock if `intercept` is `lambda call: call.stock()`.

    Args:
        module: A component, with nothing attached.
        intercept: Gets an `AttentionCall` and returns attention's output `[B, N, H, D]`.
        pipe: What runs the component, if it is known: it tells where generations and steps begin.

    Raises:
        ValueError: If something is attached to the component already.
        TypeError: If a layer calls no attention function that is known.
    """
    return host_of(module).attach(module, intercept, pipe)


def attachment_of(module: nn.Module) -> Attachment | None:
    """What is attached to a component; a deep copy of it has its own."""
    return host_of(module).attachment_of(module)


@contextlib.contextmanager
def attached(model: Any, intercepts: Mapping[str, Intercept]) -> Iterator[dict[str, Attachment]]:
    """Inside the block, the self-attention calls of a model's components go to their intercepts, by name."""
    found = components(model)
    with contextlib.ExitStack() as stack:
        attachments = {}
        for name, intercept in intercepts.items():
            attachments[name] = attach(found[name], intercept, model)
            stack.callback(attachments[name].detach)
        yield attachments


def workload(model: Any, settings: GenerationSettings) -> Workload:
    """What a model is run for, at a size and in a way; the search and the reports run it by this alone."""
    return host_of(model).workload(model, settings)
