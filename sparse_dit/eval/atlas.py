"""The atlas of heads: what each head was given, with a picture of its attention and its mask."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..index import pattern_index
from ..layout import TokenLayout
from ..patterns import Pattern
from ..plan import ComponentPlan
from .pictures import mask_map

# layer -> one value for each head; None where there is none
PerHead = Mapping[str, Sequence[np.ndarray | None]]
Numbers = Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class HeadCell:
    """One head in one stage.

    Attributes:
        layer: The module path of its layer.
        head: The number of the head in the layer.
        pattern: The pattern that the plan gives the head.
        density: Computed pairs over all pairs, pooled ones included.
        error: Relative L2 error of its output on the calibration clips; None if not measured.
        runner_up: The next best candidate, and `runner_up_error` its error.
        recall: Share of the attention mass that is computed exactly; None if not measured.
        attention: `[S, S]`, S <= 128, in the head's own token order; None if not recorded.
        mask: `[S, S, 2]`: fraction exact, fraction far field.
        depends: Whether the search found that its important tiles depend on the prompt.
    """

    layer: str
    head: int
    pattern: Pattern
    density: float
    error: float | None
    runner_up: Pattern | None
    runner_up_error: float | None
    recall: float | None
    attention: np.ndarray | None
    mask: np.ndarray
    depends: bool = False


@dataclass(frozen=True)
class StageAtlas:
    """All heads of one transformer in one stage of noise, by layer; `density` is their mean."""

    component: str
    title: str
    density: float
    layers: dict[str, list[HeadCell]]


def stage_atlas(
    name: str,
    component: ComponentPlan,
    stage: int,
    layout: TokenLayout,
    *,
    attention: PerHead | None = None,
    recall: Numbers | None = None,
    marked: Collection[tuple[str, str, int, int]] = (),
    size: int = 96,
) -> StageAtlas:
    """The atlas of one stage.

    Args:
        name: The component's name, `transformer` or `transformer_2`.
        component: The component's part of the plan.
        stage: The number of the stage in `component.stages`.
        layout: The token layout at which masks and densities are shown.
        attention: Recorded attention maps, layer -> head.
        recall: Share of the mass computed exactly, layer -> head.
        marked: `(component, layer, stage, head)` of heads that depend on the prompt.
        size: Largest side of the masks' pictures.
    """
    masks: dict[Pattern, tuple[float, np.ndarray]] = {}
    layers: dict[str, list[HeadCell]] = {}
    for layer, stages in component.layers.items():
        cells = []
        for head, choice in enumerate(stages[stage]):
            if choice.pattern not in masks:
                entry = pattern_index(choice.pattern, layout)
                masks[choice.pattern] = (entry.density, mask_map(entry, size))
            density, mask = masks[choice.pattern]
            cells.append(
                HeadCell(
                    layer,
                    head,
                    choice.pattern,
                    density,
                    choice.error,
                    choice.runner_up,
                    choice.runner_up_error,
                    _pick(recall, layer, head),
                    _pick(attention, layer, head),
                    mask,
                    (name, layer, stage, head) in marked,
                )
            )
        layers[layer] = cells
    chosen = component.stages[stage]
    title = f"sigma {chosen.progress_max:g} to {chosen.progress_min:g}"
    if chosen.branch != "any":
        title += f", {chosen.branch} branch"
    densities = [cell.density for cells in layers.values() for cell in cells]
    return StageAtlas(name, title, float(np.mean(densities)) if densities else 1.0, layers)


def _pick(table, layer, head):  # one value of a table that may lack it
    values = (table or {}).get(layer)
    return None if values is None or head >= len(values) else values[head]
