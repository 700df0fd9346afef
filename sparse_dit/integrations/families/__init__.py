"""Which transformers of diffusers 0.42.1 are known; their forwards were read at
https://github.com/huggingface/diffusers. One file for each group of models with the same sequence.
"""

from __future__ import annotations

from torch import nn

from ...call import Branch
from . import (
    allegro,
    anyflow,
    auraflow,
    bria,
    cogvideox,
    cogview,
    cosmos,
    dit,
    easyanimate,
    ernie,
    flux,
    helios,
    hidream,
    hunyuan,
    hunyuan_image,
    ideogram,
    joyimage,
    kandinsky,
    krea,
    ltx,
    lumina,
    minimax,
    mochi,
    motif,
    pixart,
    prx,
    qwen,
    sd3,
    wan,
    zimage,
)
from .family import Family, forward_arguments, sigma_of

__all__ = ["BRANCHES", "FAMILIES", "Family", "family_of", "forward_arguments", "sigma_of"]

FAMILIES: dict[str, Family] = {
    **wan.FAMILIES,
    **cogvideox.FAMILIES,
    **hunyuan.FAMILIES,
    **ltx.FAMILIES,
    **flux.FAMILIES,
    **qwen.FAMILIES,
    **sd3.FAMILIES,
    **pixart.FAMILIES,
    **zimage.FAMILIES,
    **hunyuan_image.FAMILIES,
    **lumina.FAMILIES,
    **cogview.FAMILIES,
    **hidream.FAMILIES,
    **krea.FAMILIES,
    **auraflow.FAMILIES,
    **ernie.FAMILIES,
    **mochi.FAMILIES,
    **allegro.FAMILIES,
    **motif.FAMILIES,
    **kandinsky.FAMILIES,
    **helios.FAMILIES,
    **easyanimate.FAMILIES,
    **cosmos.FAMILIES,
    **anyflow.FAMILIES,
    **joyimage.FAMILIES,
    **dit.FAMILIES,
    **minimax.FAMILIES,
    **ideogram.FAMILIES,
    **bria.FAMILIES,
    **prx.FAMILIES,
}

# names that pipelines give to `transformer.cache_context`; "cond_uncond" is both in one batch
BRANCHES: dict[str, Branch] = {
    "cond": "cond",
    "pred_cond": "cond",
    "uncond": "uncond",
    "pred_uncond": "uncond",
    # the prompt again, with layers skipped or scores perturbed
    "pred_cond_skip": "cond",
    "pred_cond_seg": "cond",
}


def family_of(transformer: nn.Module) -> Family | None:
    """The family of a transformer's class or of a class that it derives from."""
    names = (cls.__name__ for cls in type(transformer).__mro__)
    return next((FAMILIES[name] for name in names if name in FAMILIES), None)
