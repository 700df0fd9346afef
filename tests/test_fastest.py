"""`patch(..., dense="fastest")`: dense calls by the fastest exact kernel, equal to stock's to rounding."""

from dataclasses import replace

import pytest
import torch

import sparse_dit
from sparse_dit import fastest
from sparse_dit.integrations import attached, components
from sparse_dit.online import online_plan
from sparse_dit.patterns import Dense, Pattern
from sparse_dit.plan import HeadChoice, Plan
from sparse_dit.summary import Summary
from tests.helpers.tiny_language_models import text
from tests.helpers.tiny_pipelines import generate, wan


def dense_plan(pipe) -> Plan:
    """Every head dense at all noise levels."""
    plan = online_plan(pipe, "online", density=1.0)
    parts = {}
    for name, part in plan.components.items():
        layers = {
            layer: tuple((HeadChoice(Pattern(Dense())),) * len(heads) for heads in stages)
            for layer, stages in part.layers.items()
        }
        parts[name] = replace(part, layers=layers)
    return Plan(plan.pipeline_class, parts, 1.0)


def note(summary: Summary) -> str:
    return " ".join(text for text in summary.notes if "dense calls over" in text)


@pytest.mark.parametrize("winner", [fastest.STOCK, fastest.OWN])
def test_dense_calls_go_to_the_fastest_and_are_equal_to_rounding(winner, monkeypatch):
    pipe, call = wan()
    stock = generate(pipe, call, 0)
    times = iter(range(1, 100)) if winner == fastest.STOCK else iter(range(100, 1, -1))

    class Stopwatch:
        def run(self, work, device):
            self.seconds = float(next(times))
            return work()

    monkeypatch.setattr(fastest, "Stopwatch", Stopwatch)
    with sparse_dit.patch(pipe, dense_plan(pipe), dense="fastest") as handle:
        got = generate(pipe, call, 0)
        ran = handle.ran["transformer"]
        assert f"by {winner}" in note(handle.summary()) and "ms, " in note(handle.summary())
    assert (got - stock).abs().max() < 1e-3
    assert all(record.dense_because for record in ran)
    assert torch.equal(generate(pipe, call, 0), stock), "stock again"


def test_the_default_is_stock_bit_for_bit():
    pipe, call = wan()
    stock = generate(pipe, call, 0)
    with sparse_dit.patch(pipe, dense_plan(pipe)) as handle:
        assert torch.equal(generate(pipe, call, 0), stock)
        assert not note(handle.summary())


def test_a_kernel_that_computes_something_else_is_found_out(monkeypatch):
    pipe, call = wan()
    stock = generate(pipe, call, 0)
    monkeypatch.setattr(
        fastest, "attend_call", lambda call, index, backend: (call.stock() + 0.1, "wrong")
    )
    with sparse_dit.patch(pipe, dense_plan(pipe), dense="fastest") as handle:
        assert torch.equal(generate(pipe, call, 0), stock)
        assert "away from stock's" in " ".join(handle.summary().notes)


def test_a_language_models_masks_are_kept():
    model, inputs = text("llama")
    inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    inputs["attention_mask"][0, :5] = 0
    with torch.no_grad():
        stock = model(**inputs).logits
        runner = fastest.Fastest(lambda text: pytest.fail(text))
        with attached(model, dict.fromkeys(components(model), runner.attend)):
            got = [model(**inputs).logits for _ in range(3)]
    for logits in got:
        assert (logits - stock)[inputs["attention_mask"].bool()].abs().max() < 1e-4


def test_what_needs_a_gradient_runs_stock():
    pipe, _ = wan()
    with sparse_dit.patch(pipe, dense_plan(pipe), dense="fastest"):
        x = torch.randn(1, 16, 2, 8, 8, requires_grad=True)
        out = pipe.transformer(x, torch.tensor([500]), torch.randn(1, 8, 32), return_dict=False)[0]
        out.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_a_word_that_is_unknown_and_exact_are_refused():
    pipe, _ = wan()
    with pytest.raises(ValueError, match="dense must be 'stock' or 'fastest', got 'fast'"):
        sparse_dit.patch(pipe, dense_plan(pipe), dense="fast")
    with pytest.raises(ValueError, match="'exact' computes by"):
        sparse_dit.patch(pipe, "exact", dense="fastest")
