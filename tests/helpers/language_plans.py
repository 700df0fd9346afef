"""Plans for tiny language models, the same pattern for all heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_dit.attend_call import attend_call
from sparse_dit.call import AttentionCall
from sparse_dit.estimate import estimated_index
from sparse_dit.integrations import attach, heads_of
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Budget, Dense, Pattern, SinkWindow, VerticalSlash
from sparse_dit.plan import ComponentPlan, HeadChoice, Plan, Stage, config_hash
from sparse_dit.runtime import Runtime
from tests.helpers.tiny_language_models import logits

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


def run_beside_reference(
    model: Any, inputs: dict[str, Any], plan: Plan
) -> tuple[Runtime, list[AttentionCall], list[float]]:
    """A forward under a plan, each of whose calls must be what the reference backend computes of its index.

    Returns:
        The runtime that has run, the calls, and the density of the index of each.
    """
    part = plan.components["model"]
    runtime, calls, densities = Runtime("model", part, "auto"), [], []

    def both(call: AttentionCall) -> Tensor:
        q, k = call.q.transpose(1, 2), call.k.transpose(1, 2)
        shapes = [head.pattern.shape for head in part.layers[call.layer][0]]
        index = estimated_index(
            q,
            k,
            shapes,
            scale=call.scale,
            rows=None if call.attn_mask is None else call.rows,
            modalities=next(iter(call.context.modalities), None),
        )
        want, _ = attend_call(call, index, "reference")
        got = runtime(call)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        calls.append(call)
        densities.append(index.density)
        return got

    attachment = attach(model, both)
    logits(model, inputs)
    attachment.detach()
    for ran, density in zip(runtime.ran, densities, strict=True):
        assert ran.dense_because is None
        assert ran.computed / ran.pairs == pytest.approx(density)
    return runtime, calls, densities
