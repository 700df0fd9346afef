"""The host diffusers: what `host.Host` asks for."""

from .attachment import (
    attach,
    attachment_of,
    components,
    heads_of,
    output_projection,
    self_attention_layers,
)
from .loading import add_lora, load, outline
from .pipeline import Generation as workload
from .probe import probe
from .schedule import noise_level, steps_of
from .teacher import OneStep as one_step

__all__ = [
    "add_lora",
    "attach",
    "attachment_of",
    "components",
    "heads_of",
    "load",
    "noise_level",
    "one_step",
    "outline",
    "output_projection",
    "probe",
    "self_attention_layers",
    "steps_of",
    "workload",
]
