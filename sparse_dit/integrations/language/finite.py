"""NaN in what a model says of a token ends what is written: of all tokens none would be the likeliest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...nan_guard import refuse_nan


@contextmanager
def numbers_only(model: nn.Module) -> Iterator[None]:
    """Inside the block a forward whose logits of its last token are NaN raises ValueError.

    NaN of any token is in the keys of the next layer, and so in every token. Waits for the device, as
    pipelines that write do in every step anyway.
    """

    def check(module: nn.Module, _: tuple, out: Any) -> None:
        refuse_nan(module, out.logits[:, -1])

    hook = model.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()
