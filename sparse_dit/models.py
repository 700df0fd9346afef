"""Which models can be patched, and how one more transformer is made known."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .integrations.families import FAMILIES, Family
from .integrations.families.unqualified import UNQUALIFIED
from .integrations.language.tested import LANGUAGE_MODELS, VLMS
from .layout import TokenLayout


@dataclass(frozen=True)
class SupportedModel:
    """A class of models.

    Attributes:
        transformer: Name of the class.
        tested: What the tests run with the patch on: a whole `"pipeline"`, or the `"transformer"`
            alone; a `"language model"` or `"VLM"` of transformers; `"nothing"` if it was made known by
            `add_model`.
        reason: Why it can't be patched; None if it can.
    """

    transformer: str
    tested: Literal["pipeline", "transformer", "language model", "VLM", "nothing"]
    reason: str | None = None

    @property
    def of_diffusers(self) -> bool:
        """Whether it is a transformer of diffusers, or one made known like them."""
        return self.tested not in ("language model", "VLM")


def supported_models() -> list[SupportedModel]:
    """Every class that is known: diffusers' transformers, transformers' models, those that don't qualify.

    Of transformers, these are the ones that are tested; others that call its `AttentionInterface` are taken.
    """
    known = [SupportedModel(name, family.tested) for name, family in sorted(FAMILIES.items())]
    known += [SupportedModel(name, "language model") for name in LANGUAGE_MODELS]
    known += [SupportedModel(name, "VLM") for name in VLMS]
    return known + [
        SupportedModel(name, "nothing", reason) for name, reason in sorted(UNQUALIFIED.items())
    ]


def add_model(
    transformer: type[nn.Module],
    layers: str,
    layout: Callable[[Any, Any], TokenLayout | None],
    **details: Any,
) -> None:
    """Make a transformer class known to `patch`, the search and `check`, in this process.

    Args:
        transformer: The class; classes that derive from it are known too.
        layers: Regular expression of the module paths of its self-attention layers. Their processors
            must call `dispatch_attention_fn` or `F.scaled_dot_product_attention`.
        layout: Function of (config, forward arguments by name) -> where text, frames, rows and columns
            lie in these layers' sequence; None where the arguments don't tell.
        details: Other fields of `Family`: `max_timestep`, `heads`, ...

    Raises:
        TypeError: If `transformer` is no class of modules, `layout` can't be called, or a detail is
            unknown.
        ValueError: If the class is known already, or `layers` is no regular expression.
    """
    if not (isinstance(transformer, type) and issubclass(transformer, nn.Module)):
        raise TypeError(f"transformer must be a class of torch modules, got {transformer!r:.60}")
    if not callable(layout):
        raise TypeError(
            f"layout must be a function (config, arguments) -> TokenLayout, got {layout!r}"
        )
    name = transformer.__name__
    if name in FAMILIES:
        raise ValueError(f"{name} is known already; derive a class to treat it in another way")
    try:
        re.compile(layers)
    except (re.error, TypeError) as error:
        raise ValueError(f"layers must be a regular expression, got {layers!r}: {error}") from None
    FAMILIES[name] = Family(layers, layout, **{"tested": "nothing", **details})
