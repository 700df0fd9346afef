"""Prompts with images or videos, as a processor makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...call import AttentionCall
from ...integrations import attached
from ...modalities import Modalities
from .reading import Text
from .scores import COMPONENT


@torch.no_grad()
def read_prompt(model: Any, inputs: Mapping[str, Tensor]) -> Text:
    """A prompt with images or videos, and where they lie, which one dense forward tells.

    Args:
        model: The VLM, not attached.
        inputs: What its processor makes of one prompt: `input_ids` `[1, N]`, pixels, grids, ...

    Raises:
        ValueError: If it isn't one prompt without padding, or has no image or video whose place is known.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if ids.ndim != 2 or len(ids) != 1 or (mask is not None and not bool(mask.all())):
        raise ValueError(
            f"a prompt must be one of a batch, without padding, got ids {tuple(ids.shape)}"
        )
    found: dict[str, Modalities] = {}

    def told(call: AttentionCall) -> Tensor:
        for modalities in call.context.modalities:
            found[call.layer] = modalities
        return call.stock()

    given = {name: x.to(model.device) for name, x in inputs.items()}
    with attached(model, {COMPONENT: told}):
        model(**given, use_cache=False, logits_to_keep=1)
    where = next(iter(found.values()), None)
    if where is None or where.unknown is not None or not where.media:
        reason = where.unknown if where is not None and where.unknown else "there is none"
        raise ValueError(
            f"a prompt must have an image or a video whose place is known, but {reason}"
        )
    return Text.of_prompt(inputs, where)
