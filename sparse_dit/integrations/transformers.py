"""The host transformers: what `host.Host` asks for."""

from .language.attachment import (
    attach,
    attachment_of,
    components,
    heads_of,
    output_projection,
    self_attention_layers,
)
from .language.loading import check, load

__all__ = [
    "attach",
    "attachment_of",
    "check",
    "components",
    "heads_of",
    "load",
    "output_projection",
    "self_attention_layers",
]
