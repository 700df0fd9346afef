"""Transformers of diffusers 0.42.1 that a plan can't thin out, and why.

Some have no attention worth it; the attention of others isn't one that the seam can follow. A class of the
second kind can be made known with `sparse_dit.add_model` where one's own use of it fits.
"""

from __future__ import annotations

_LINEAR = "its self-attention is linear: no pairs of tokens are computed, so there are none to skip"
_SOUND = "it makes sound: one sequence in time, no frames, rows and columns"

UNQUALIFIED: dict[str, str] = {
    "SanaTransformer2DModel": _LINEAR,
    "SanaControlNetModel": _LINEAR,
    "LatteTransformer3DModel": (
        "it attends within one frame, and over time at one place: short sequences, nothing to skip"
    ),
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMTransformer3DModel": (
        "its self-attention is linear but for every fourth layer, which has no processor to redirect: "
        "what could be saved there is left"
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (
        "its video also attends to a window of earlier video, whose frames are part of its grid but no "
        "queries: it attends over all of it"
    ),
    "AceStepTransformer1DModel": _SOUND,
    "LongCatAudioDiTTransformer": _SOUND,
    "MiniMaxMusic3RVQDepthDecoder": _SOUND,
    "MiniMaxMusic3Transformer1DModel": _SOUND,
    "StableAudioDiTModel": _SOUND,
    "StableAudio3DiTModel": _SOUND,
    "T5FilmDecoder": _SOUND,
    "RFD4ProteinaTransformer": "it makes proteins: no frames, rows and columns",
    "PriorTransformer": "it makes one embedding: a handful of tokens, nothing to skip",
    "Transformer2DModel": "it is one stage of a U-Net, not a model of its own",
    "DreamLiteTransformer2DModel": ("it is one stage of a U-Net, not a model of its own"),
    "TransformerTemporalModel": "it attends over time at one place: short sequences, nothing to skip",
    "AnyFlowFARTransformer3DModel": (
        "its attention is block-causal, with cached frames as keys: long videos attend to all that was"
    ),
    "WanAnimate2Transformer3DModel": (
        "its attention has a sparse pattern of its own over cached reference frames: that one stays"
    ),
    "Kandinsky6SRTransformer3DModel": (
        "its attention has a sparse pattern of its own (NABLA): that one stays"
    ),
    "OmniGenTransformer2DModel": (
        "a mask of tokens by tokens makes its text causal before its image: images attend to all"
    ),
}
