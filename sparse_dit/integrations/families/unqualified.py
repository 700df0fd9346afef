"""Transformers of diffusers 0.42.1 that have no attention a plan could thin out, and why."""

from __future__ import annotations

_LINEAR = "its self-attention is linear: no pairs of tokens are computed, so there are none to skip"

UNQUALIFIED: dict[str, str] = {
    "SanaTransformer2DModel": _LINEAR,
    "SanaControlNetModel": _LINEAR,
    "LatteTransformer3DModel": (
        "it attends within one frame, and over time at one place: short sequences, nothing to skip"
    ),
    "SanaVideoTransformer3DModel": _LINEAR,
}
