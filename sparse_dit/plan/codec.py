"""A component as its part of the document: patterns interned, heads as their numbers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..layout import TokenLayout
from ..patterns import Pattern
from .component import ComponentPlan, HeadChoice, Stage, check_layer
from .document import place
from .errors import PlanError, short
from .schema import MAX_PATTERNS, ComponentForm, EvidenceForm, LayerForm, OldComponentForm

_EVIDENCE = ("error", "runner_up", "runner_up_error")


def to_document(component: ComponentPlan) -> dict[str, Any]:
    """JSON form of one component."""
    patterns = component.distinct_patterns
    if len(patterns) > MAX_PATTERNS:
        raise PlanError(f"patterns: at most {MAX_PATTERNS} distinct ones, got {len(patterns)}")
    number = {pattern: i for i, pattern in enumerate(patterns)}
    layers = component.layers
    return {
        "kind": component.kind,
        "model_class": component.model_class,
        "config_hash": component.config_hash,
        "layout": component.layout.to_dict(),
        "valid_tokens": list(component.valid_tokens),
        "stages": [_stage(stage) for stage in component.stages],
        "patterns": [pattern.to_dict() for pattern in patterns],
        "layers": {
            layer: {
                **dict(zip(("num_heads", "head_dim"), component.heads[layer], strict=True)),
                "patterns": [[number[head.pattern] for head in heads] for heads in stages],
            }
            for layer, stages in layers.items()
        },
        "evidence": {
            layer: [_evidence(heads, number) for heads in stages]
            for layer, stages in layers.items()
            if any(head.error is not None or head.runner_up for heads in stages for head in heads)
        },
    }


def from_form(
    form: ComponentForm | OldComponentForm, where: str, tensors: dict[str, Tensor]
) -> ComponentPlan:
    """The component that a checked document describes.

    Args:
        form: Its part of the document.
        where: Its place in the document, for messages.
        tensors: The plan's tensors, for "blocks".

    Raises:
        PlanError: If values contradict each other or a pattern is wrong.
    """
    patterns = tuple(
        _at(f"{where}.patterns[{i}]: ", Pattern.from_dict, data, tensors)
        for i, data in enumerate(form.patterns)
    )
    stages = tuple(
        _at(
            f"{where}.stages[{i}]: ",
            Stage,
            *(stage.progress_max, stage.progress_min, stage.branch, stage.phase),
        )
        for i, stage in enumerate(form.stages)
    )
    given = form.each_layer()
    places = {layer: place_of(where, layer) + form.patterns_at for layer in given}
    for layer, entry in given.items():  # or what is said of its heads would be blamed
        check_layer(places[layer], entry.patterns, len(stages), entry.num_heads)
    for layer in form.evidence:
        if layer not in given:
            raise PlanError(f'{where}.evidence."{layer}": no such layer in layers; remove it')
    layers = {
        layer: tuple(
            _heads(
                ids,
                _evidence_of(form.evidence, layer, i, entry, where),
                patterns,
                f"{places[layer]}[{i}]",
            )
            for i, ids in enumerate(entry.patterns)
        )
        for layer, entry in given.items()
    }
    return _at(
        f"{where}.",
        ComponentPlan,
        form.model_class,
        form.config_hash,
        {layer: (entry.num_heads, entry.head_dim) for layer, entry in given.items()},
        _at(f"{where}.layout: ", TokenLayout.from_dict, form.layout, form.segments),
        stages,
        layers,
        (form.valid_tokens[0], form.valid_tokens[1]),
        form.kind,
    )


def place_of(where: str, layer: str, section: str = "layers") -> str:
    """Place of a layer in the document: `components.transformer.layers."blocks.0.attn1"`."""
    return f"{where}.{place((section, layer))}"


def _at(where: str, make: Any, *arguments: Any) -> Any:
    try:
        return make(*arguments)
    except ValueError as error:
        raise PlanError(f"{where}{error}") from None


def _stage(stage: Stage) -> dict[str, Any]:
    data = {name: getattr(stage, name) for name in ("progress_max", "progress_min")}
    named = {"branch": stage.branch, "phase": stage.phase}
    return data | {name: value for name, value in named.items() if value != "any"}


def _evidence(heads: tuple[HeadChoice, ...], number: dict[Pattern, int]) -> dict[str, Any]:
    columns = {
        "error": [head.error for head in heads],
        "runner_up": [None if h.runner_up is None else number[h.runner_up] for h in heads],
        "runner_up_error": [head.runner_up_error for head in heads],
    }
    return {name: column for name, column in columns.items() if any(x is not None for x in column)}


def _evidence_of(
    evidence: dict[str, list[EvidenceForm]], layer: str, stage: int, entry: LayerForm, where: str
) -> EvidenceForm:
    if layer not in evidence:
        return EvidenceForm()
    entries, needed = evidence[layer], len(entry.patterns)
    here = place_of(where, layer, "evidence")
    if len(entries) != needed:
        raise PlanError(f"{here}: must have {needed} stages as in layers, got {len(entries)}")
    for name in _EVIDENCE:
        column = getattr(entries[stage], name)
        if column is not None and len(column) != entry.num_heads:
            raise PlanError(
                f"{here}[{stage}].{name}: must have {entry.num_heads} heads, got {len(column)}"
            )
    return entries[stage]


def _heads(
    ids: list[int], evidence: EvidenceForm, patterns: tuple[Pattern, ...], where: str
) -> tuple[HeadChoice, ...]:
    def pattern(number: int | None, head: int) -> Pattern | None:
        if number is not None and number >= len(patterns):
            raise PlanError(
                f"{where}[{head}]: must be the number of one of the {len(patterns)} patterns, "
                f"got {short(number)}"
            )
        return None if number is None else patterns[number]

    columns = [getattr(evidence, name) or [None] * len(ids) for name in _EVIDENCE]
    return tuple(
        _at(
            f"{where}[{head}]: ",
            HeadChoice,
            pattern(i, head),
            error,
            pattern(spare, head),
            spare_error,
        )
        for head, (i, error, spare, spare_error) in enumerate(zip(ids, *columns, strict=True))
    )
