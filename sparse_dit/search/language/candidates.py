"""What each head of a language model or VLM may do."""

from __future__ import annotations

from collections.abc import Mapping

from ...modalities import MODALITIES, Modality
from ...patterns import (
    Budget,
    ByQuery,
    Dense,
    Grid,
    OwnPart,
    Pattern,
    PooledBlocks,
    SinkWindow,
    VerticalSlash,
)

SHARES = (0.02, 0.035, 0.06, 0.1, 0.17, 0.3)  # beta of budgets: keys a row for each key
LEAST = 128  # keys a row, at any length
DENSE = Pattern(Dense())


def candidates(media: bool = False) -> tuple[Pattern, ...]:
    """Patterns of all heads alike, dense first; budgets grow with the length (MoA's rule with alpha 0).

    Args:
        media: Whether there are images or videos, so that rows of each modality are estimated for themselves.
    """
    found = [DENSE]
    for beta in SHARES:
        budget = Budget(beta=beta, least=LEAST)
        found.append(Pattern(SinkWindow(budget=budget)))
        found += [Pattern(VerticalSlash(rows=rows, budget=budget)) for rows in ("both", "last")]
        found.append(Pattern(PooledBlocks(budget=budget)))
        if media:
            found += [Pattern(Grid(budget=budget)), Pattern(Grid(vertical=False, budget=budget))]
    if media:
        found.append(Pattern(OwnPart()))
        found[1:] = [by_modality(dict.fromkeys(MODALITIES, pattern)) for pattern in found[1:]]
    return tuple(found)


def by_modality(patterns: Mapping[Modality, Pattern]) -> Pattern:
    """The pattern of a head whose rows of each modality follow one of `candidates(media=True)`.

    A modality that isn't there does as the others: an image as a video, a video as an image.
    """
    shapes = {
        name: getattr(pattern.shape, name, pattern.shape) for name, pattern in patterns.items()
    }
    text = shapes.get("text", Dense())
    image = shapes.get("image", shapes.get("video", text))
    video = shapes.get("video", image)
    if all(shape == Dense() for shape in (text, image, video)):
        return DENSE
    return Pattern(ByQuery(text, image, video))
