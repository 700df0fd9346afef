"""Record what a transformer gives in one generation, and play its beginning back in another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..call import Intercept
from ..integrations import attach


@contextlib.contextmanager
def recording(transformer: nn.Module) -> Iterator[list[tuple[float, Any]]]:
    """Inside the block, the noise level and output of every forward of a transformer are added to a list.

    A forward whose noise level can't be told counts as pure noise, 1.
    """
    record: list[tuple[float, Any]] = []
    attachment = attach(transformer, lambda call: call.stock())

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        sigma = attachment.context.sigma
        record.append((1.0 if sigma is None else sigma, output))

    hook = transformer.register_forward_hook(note)
    try:
        yield record
    finally:
        hook.remove()
        attachment.detach()


@contextlib.contextmanager
def replaying(
    transformer: nn.Module, outputs: Sequence[Any], intercept: Intercept, pipe: Any = None
) -> Iterator[None]:
    """Inside the block the first forwards return `outputs`, unread; the others run with `intercept`.

    Args:
        transformer: A transformer of a supported class, with nothing attached.
        outputs: What the first forwards of the same generation returned; hosts don't write to them.
        intercept: Sees the attention calls of the forwards that run.
        pipe: The pipeline that runs the transformer, if it is known.
    """
    before = vars(transformer).get("forward")  # offloading puts its own there
    run, waiting = transformer.forward, list(reversed(outputs))

    def forward(*args: Any, **kwargs: Any) -> Any:
        return waiting.pop() if waiting else run(*args, **kwargs)

    attachment = attach(transformer, intercept, pipe)
    transformer.forward = forward
    try:
        yield
    finally:
        if before is None:
            del transformer.forward
        else:
            transformer.forward = before
        attachment.detach()
