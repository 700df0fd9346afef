"""What asks for a grid is told that text has none."""

from __future__ import annotations

from typing import Any, NoReturn


def probe(model: Any, *_: Any) -> NoReturn:
    """As `Host.probe`.

    Raises:
        NotImplementedError: Always.
    """
    raise NotImplementedError(
        f"a plan from geometry is for videos and images, and {type(model).__name__} has text: search a "
        'plan for it, or patch it with "exact", or with "online" if it is a diffusion language model'
    )
