"""The atlas of a language model's heads: which shape each has, and how much it computes of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from ...call import AttentionCall
from ...integrations import attached
from ...patterns import Pattern
from ...plan import Plan
from ...search.language.costs import index_of
from ...search.language.reading import Text, read
from ...search.language.scores import is_whole
from ..figures import COLOURS

PALEST = 0.2  # share of the colour that a head of density 0 has
MANY = 16  # heads of a layer: with more there is no room for numbers


@dataclass(frozen=True)
class TextHead:
    """One head.

    Attributes:
        layer: The module path of its layer.
        head: Its number in the layer.
        pattern: What the plan gives it.
        density: Computed pairs over those of causal order, on the text.
        error: Relative L2 error of its output on the calibration texts; None if not noted.
    """

    layer: str
    head: int
    pattern: Pattern
    density: float
    error: float | None


def text_heads(model: Any, plan: Plan, text: Text) -> list[TextHead]:
    """Every head of a plan's layers, with its density on a text that the model reads dense."""
    ((name, part),) = plan.components.items()
    found: list[TextHead] = []

    def look(call: AttentionCall) -> Tensor:
        if call.layer in part.layers and is_whole(call):
            (choices, *_) = part.layers[call.layer]
            index = index_of(call, [choice.pattern for choice in choices])
            for head, (choice, density) in enumerate(
                zip(choices, index.head_density.tolist(), strict=True)
            ):
                found.append(TextHead(call.layer, head, choice.pattern, density, choice.error))
        return call.stock()

    with torch.no_grad(), attached(model, {name: look}):
        read(model, text)
    return found


def heads_figure(heads: Sequence[TextHead]) -> Figure:
    """A row for each layer, a cell for each head: its shape by colour, darker the more it computes."""
    layers = list(dict.fromkeys(head.layer for head in heads))
    wide = max(head.head for head in heads) + 1
    shapes = sorted({head.pattern.name for head in heads})
    colours = dict(zip(shapes, map(to_rgb, COLOURS), strict=False))
    picture = np.ones((len(layers), wide, 3))
    figure = Figure(figsize=(2.2 + 0.42 * wide, 1.2 + 0.24 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for head in heads:
        row = layers.index(head.layer)
        strength = PALEST + (1 - PALEST) * min(1.0, head.density)
        picture[row, head.head] = 1 - strength * (1 - np.array(colours[head.pattern.name]))
        if wide <= MANY:
            ink = "white" if strength > 0.6 else "black"
            axes.text(
                head.head, row, f"{head.density:.0%}", ha="center", va="center", fontsize=6, color=ink
            )  # fmt: skip
    axes.imshow(picture, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(0, wide, 1 + wide // MANY))
    axes.set_yticks(range(len(layers)), layers, fontsize=6)
    axes.set_xlabel("head")
    axes.tick_params(length=0)
    patches = [Patch(color=colours[shape], label=shape.replace("_", " ")) for shape in shapes]
    figure.legend(handles=patches, loc="outside upper center", ncols=2, frameon=False, fontsize=7)
    return figure


def as_image(figure: Figure) -> Image.Image:
    """A drawn figure as a picture on white."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
