"""What differs between two plans, plans put together, and a plan as table rows."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import groupby
from typing import Any

from ..patterns import Pattern
from .component import ComponentPlan, HeadChoice
from .errors import PlanError
from .plan import Plan

_FACTS = ("kind", "model_class", "config_hash", "layout", "valid_tokens")
_NOTES = ("forecast", "measured", "cost", "provenance")


def diff(a: Plan, b: Plan) -> list[str]:
    """Readable lines on what changed from `a` to `b`: none if the plans are equal."""
    lines = []
    for name in ("pipeline_class", "density"):
        old, new = getattr(a, name), getattr(b, name)
        if old != new:
            lines.append(f"{name}: {_fact(old)} -> {_fact(new)}")
    for name in dict.fromkeys([*a.components, *b.components]):
        if name not in b.components:
            lines.append(f"{name}: removed")
        elif name not in a.components:
            lines.append(f"{name}: added")
        else:
            found = _components(a.components[name], b.components[name])
            lines.extend(f"{name}: {line}" for line in found)
    for name in _NOTES:
        old, new = getattr(a, name), getattr(b, name)
        keys = [
            k
            for k in dict.fromkeys([*old, *new])
            if k not in old or k not in new or old[k] != new[k]
        ]
        if keys:
            lines.append(f"{name}: differs in {', '.join(keys)}")
    return lines


def merge(*plans: Plan) -> Plan:
    """One plan out of plans for different transformers of the same pipeline.

    What each part forecast, measured and came from is kept in `provenance["merged"]`: it holds for
    that part alone. Density is weighted by the pairs of each plan's layers at calibration.

    Raises:
        PlanError: If the pipelines differ, or two plans disagree on one transformer.
    """
    if not plans:
        raise PlanError("merge needs at least one plan, got none")
    components: dict[str, ComponentPlan] = {}
    for plan in plans:
        if plan.pipeline_class != plans[0].pipeline_class:
            raise PlanError(
                "merged plans must be for one pipeline, "
                f"got {plans[0].pipeline_class} and {plan.pipeline_class}"
            )
        for name, component in plan.components.items():
            if name in components and components[name] != component:
                raise PlanError(
                    f"merged plans must be for different transformers, two disagree on {name!r}; "
                    "leave one of them out"
                )
            components[name] = component
    if len(plans) == 1:
        return plans[0]
    weights = [sum(_pairs(c) for c in plan.components.values()) for plan in plans]
    density = sum(w * plan.density for w, plan in zip(weights, plans, strict=True)) / sum(weights)
    parts = [
        {
            "components": list(plan.components),
            "fingerprint": plan.fingerprint(),
            "density": plan.density,
        }
        | {note: getattr(plan, note) for note in _NOTES}
        for plan in plans
    ]
    cost = plans[0].cost if all(plan.cost == plans[0].cost for plan in plans) else {}
    caches = [plan.provenance.get("step_cache") for plan in plans]
    shared = (
        {"step_cache": caches[0]} if caches[0] and caches.count(caches[0]) == len(caches) else {}
    )
    return Plan(
        plans[0].pipeline_class,
        components,
        min(density, 1.0),
        provenance={"merged": parts, **shared},
        cost=cost,
    )


def summary_rows(plan: Plan) -> list[dict[str, Any]]:
    """One row for each component and stage.

    Keys: `component`, `stage` (its number), `progress`, `branch`, `layers`, `heads` (in all layers),
    `patterns` (shape name, with "+far" where there is a far field, to number of heads, most frequent
    first), `error` and `max_error` (mean and largest expected error of the heads that have one, else None).
    """
    rows = []
    for name, component in plan.components.items():
        for i, stage in enumerate(component.stages):
            heads = [head for stages in component.layers.values() for head in stages[i]]
            errors = [head.error for head in heads if head.error is not None]
            counts = Counter(h.pattern.name + ("+far" if h.pattern.far else "") for h in heads)
            rows.append(
                {
                    "component": name,
                    "stage": i,
                    "progress": f"{stage.progress_max:g} to {stage.progress_min:g}",
                    "branch": stage.branch,
                    "layers": len(component.layers),
                    "heads": len(heads),
                    "patterns": dict(counts.most_common()),
                    "error": sum(errors) / len(errors) if errors else None,
                    "max_error": max(errors, default=None),
                }
            )
    return rows


def _components(a: ComponentPlan, b: ComponentPlan) -> list[str]:
    lines = [
        f"{name}: {_fact(getattr(a, name))} -> {_fact(getattr(b, name))}"
        for name in _FACTS
        if getattr(a, name) != getattr(b, name)
    ]
    resized = Counter(
        (a.heads[layer], b.heads[layer])
        for layer in a.layers
        if a.heads[layer] != b.heads.get(layer, a.heads[layer])
    )
    lines += [
        f"heads of {count} layers: {old[0]} of {old[1]} channels -> {new[0]} of {new[1]}"
        for (old, new), count in resized.items()
    ]
    lines += [f"stage ({stage}): removed" for stage in a.stages if stage not in b.stages]
    lines += [f"stage ({stage}): added" for stage in b.stages if stage not in a.stages]
    shared = [stage for stage in a.stages if stage in b.stages]
    for layer in dict.fromkeys([*a.layers, *b.layers]):
        if layer not in b.layers or layer not in a.layers:
            lines.append(f"{layer}: {'added' if layer in b.layers else 'removed'}")
            continue
        for stage in shared:
            old = a.layers[layer][a.stages.index(stage)]
            new = b.layers[layer][b.stages.index(stage)]
            lines += [f"{layer} ({stage}) {line}" for line in _heads(old, new)]
    return lines


def _heads(old: tuple[HeadChoice, ...], new: tuple[HeadChoice, ...]) -> list[str]:
    """Changes of pattern, heads with the same change together; changed evidence in one line."""
    changed: dict[tuple[Pattern, Pattern], list[int]] = {}
    evidence = []
    for head, (a, b) in enumerate(zip(old, new, strict=False)):
        if a.pattern != b.pattern:
            changed.setdefault((a.pattern, b.pattern), []).append(head)
        elif a != b:
            evidence.append(head)
    lines = [
        f"{_ranges(heads)}: {_described(a)} -> {_described(b)}" for (a, b), heads in changed.items()
    ]
    return lines + ([f"{_ranges(evidence)}: evidence differs"] if evidence else [])


def _ranges(heads: list[int]) -> str:
    """`head 3`, or `heads 0-2,5`."""
    runs = [[h for _, h in run] for _, run in groupby(enumerate(heads), lambda e: e[1] - e[0])]
    text = ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
    return f"{'head' if len(heads) == 1 else 'heads'} {text}"


def _described(pattern: Pattern) -> str:
    """`window(frames=1, far=true)`; a long one is cut and marked with a hash of the whole."""
    data = pattern.to_dict()
    words = [f"{k}={json.dumps(v, separators=(',', ':'))}" for k, v in data.items() if k != "name"]
    text = ", ".join(words)
    if len(text) > 80:
        text = f"{text[:80]}... #{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return f"{data['name']}({text})" if text else data["name"]


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def _pairs(component: ComponentPlan) -> int:
    return max(1, component.total_heads) * component.layout.seq_len**2
