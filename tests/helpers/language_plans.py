"""Plans for tiny language models, the same pattern for all heads."""

from __future__ import annotations

from typing import Any

from sparse_dit.integrations import heads_of
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Budget, Dense, Pattern, SinkWindow, VerticalSlash
from sparse_dit.plan import ComponentPlan, HeadChoice, Plan, Stage, config_hash

SMALL = Budget(beta=0.1, least=16)
SLASH = Pattern(VerticalSlash(budget=SMALL, sampled=8, sinks=4, local=16))
NEAR = Pattern(SinkWindow(sinks=4, budget=SMALL))
DENSE = Pattern(Dense())


def plan_for(model: Any, *patterns: Pattern, tokens: int = 400, **changes: Any) -> Plan:
    """The patterns in turn for the heads of each layer, in prefill."""
    heads = heads_of(model)
    layers = {
        layer: (tuple(HeadChoice(patterns[h % len(patterns)]) for h in range(count)),)
        for layer, (count, _) in heads.items()
    }
    facts: dict[str, Any] = {
        "model_class": type(model).__name__,
        "config_hash": config_hash(model.config),
        "heads": heads,
        "layout": TokenLayout.sequence(tokens),
        "stages": (Stage(1.0, 0.0, phase="prefill"),),
        "layers": layers,
        "kind": "language_model",
    }
    return Plan("", {"model": ComponentPlan(**(facts | changes))}, 0.25)
