"""The host transformers: what `host.Host` asks for."""

from .language.attachment import (
    attach,
    attachment_of,
    components,
    denoising_layers,
    heads_of,
    self_attention_layers,
)
from .language.loading import load
from .language.no_grid import probe
from .language.writing import load_denoiser, outline_denoiser, write

__all__ = [
    "attach",
    "attachment_of",
    "components",
    "denoising_layers",
    "heads_of",
    "load",
    "load_denoiser",
    "outline_denoiser",
    "probe",
    "self_attention_layers",
    "write",
]
