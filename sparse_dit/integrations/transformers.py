"""The host transformers: what `host.Host` asks for."""

from .language.attachment import (
    attach,
    attachment_of,
    components,
    heads_of,
    output_projection,
    self_attention_layers,
)

__all__ = [
    "attach",
    "attachment_of",
    "components",
    "heads_of",
    "output_projection",
    "self_attention_layers",
]
