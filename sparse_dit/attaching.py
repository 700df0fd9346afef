"""Puts on all components of a model, or on none: attachments, a step cache, a token order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from .call import Intercept
from .plan import ComponentPlan
from .step_cache import StepCache
from .token_order import shared_tile

if TYPE_CHECKING:
    from .integrations import Attachment


def attach_all(
    targets: Mapping[str, nn.Module], intercepts: Mapping[str, Intercept], pipe: Any
) -> dict[str, Attachment]:
    """Attach to all components, or to none."""
    from .integrations import attach

    attachments: dict[str, Attachment] = {}
    with detached_on_error(attachments):
        for name, module in targets.items():
            attachments[name] = attach(module, intercepts[name], pipe)
    return attachments


@contextlib.contextmanager
def detached_on_error(attachments: Mapping[str, Attachment]) -> Iterator[None]:
    """Detach all if the block raises."""
    try:
        yield
    except BaseException:
        for attachment in attachments.values():
            attachment.detach()
        raise


def enable_step_cache(attachments: Mapping[str, Attachment], cache: StepCache) -> None:
    """Enable a step cache on all components whose library has them."""
    from .integrations import Caching

    for attachment in attachments.values():
        if isinstance(attachment, Caching):
            attachment.enable_step_cache(cache)


def sort_tokens(attachments: Mapping[str, Attachment], plans: Mapping[str, ComponentPlan]) -> None:
    """Sort the tokens of each component once a forward, by the tile that its plan's heads share.

    Raises:
        NotImplementedError: If a component isn't a diffusion transformer.
    """
    from .integrations import Sorting

    for name, attachment in attachments.items():
        if not isinstance(attachment, Sorting):
            raise NotImplementedError(
                f"token_order='plan' must be of a diffusion transformer, got {name}; leave it out"
            )
        attachment.sort_tokens(shared_tile(plans[name]))


def order_notes(attachments: Mapping[str, Attachment]) -> list[str]:
    """What is to be told of the token order of each component."""
    from .integrations import Sorting

    return [
        f"{name}: {note}"
        for name, attachment in attachments.items()
        if isinstance(attachment, Sorting)
        for note in attachment.token_order
    ]
