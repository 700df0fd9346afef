"""NaN in what a model says of a token ends what is written: of all tokens none would be the likeliest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def numbers_only(model: nn.Module) -> Iterator[None]:
    """Inside the block a forward whose logits of its last token are NaN raises ValueError.

    NaN of any token is in the keys of the next layer, and so in every token. Waits for the device, as
    pipelines that write do in every step anyway.
    """

    def check(module: nn.Module, _: tuple, out: Any) -> None:
        if out.logits[:, -1].isnan().any():
            raise ValueError(
                f"what {type(module).__name__} says of tokens must be numbers, got NaN: its weights are "
                "broken, or its dtype is too small; try bfloat16 or float32"
            )

    hook = model.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()
