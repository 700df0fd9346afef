"""Checking a plan: an unchanged model is silent, a changed layer is named, wrong input is refused."""

import copy
from dataclasses import replace

import pytest
import torch

import sparse_dit
from sparse_dit import cli
from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.integrations.diffusers import attachment_of
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Pattern, Window
from sparse_dit.plan import HeadChoice, PlanError
from sparse_dit.search.check import CheckedHead, check_plan
from tests.helpers import tiny_pipelines
from tests.helpers.eval_cases import WINDOW, uniform_plan

SETTINGS = GenerationSettings(64, 64, 17, steps=4, guidance=3.0, max_sequence_length=16)
CASE = Case("a quiet harbour", 3)
LAYOUT = TokenLayout.video(5, 4, 4)


@pytest.fixture(scope="module")
def made():
    """A tiny Wan, and a plan for it whose errors are those that were measured on another prompt."""
    pipe = tiny_pipelines.wan()[0]
    plan = uniform_plan(pipe, WINDOW, LAYOUT)
    plan = replace(plan, provenance={"errors_behind_projection": True})
    found = check_plan(pipe, plan, Case("a dog", 1), SETTINGS)
    assert found.heads and all(head.now > 0 for head in found.heads)
    return pipe, _with_errors(plan, {(h.layer, h.stage, h.head): h.now for h in found.heads})


def _with_errors(plan, errors):
    ((name, part),) = plan.components.items()
    layers = {
        layer: tuple(
            tuple(HeadChoice(h.pattern, errors[layer, s, n]) for n, h in enumerate(heads))
            for s, heads in enumerate(stages)
        )
        for layer, stages in part.layers.items()
    }
    return replace(plan, components={name: replace(part, layers=layers)})


def test_an_unchanged_model_is_silent(made):
    pipe, plan = made
    found = check_plan(pipe, plan, CASE, SETTINGS)
    ((_, part),) = plan.components.items()
    assert len(found.heads) == part.total_heads
    assert not found.left and not found.notes and found.share == 0 and found.unseen == 0
    assert attachment_of(pipe.transformer) is None


def test_a_changed_layer_is_named_and_no_other(made):
    pipe, plan = made
    changed = copy.deepcopy(pipe)
    layer = list(plan.components["transformer"].layers)[-1]
    attention = changed.transformer.get_submodule(layer)
    with torch.no_grad():  # sharp attention at random places, where it was nearly even
        for norm in (attention.norm_q, attention.norm_k):
            norm.weight.mul_(8)
    found = check_plan(changed, plan, CASE, SETTINGS)
    assert {head.layer for head in found.left} == {layer}
    heads, _ = plan.components["transformer"].heads[layer]
    assert {head.head for head in found.left} == set(range(heads))
    worst = [head.now - head.planned for head in found.left]
    assert worst == sorted(worst, reverse=True)
    assert found.share == pytest.approx(len(found.left) / len(found.heads))


def test_a_head_leaves_only_beyond_what_sampling_explains():
    head = CheckedHead(
        "transformer", "blocks.0.attn1", 0, 0, planned=0.1, now=0.2, standard_error=0.0
    )
    assert head.left() and not head.left(growth=2.0)
    assert not replace(head, standard_error=0.02).left()
    assert not replace(head, now=0.0).left()
    assert not replace(head, planned=0.0, now=0.019).left()


def test_what_differs_is_said_and_the_check_goes_on(made):
    pipe, plan = made
    ((name, part),) = plan.components.items()
    other = replace(part, config_hash="1" * 64, layout=TokenLayout.video(5, 8, 8))
    found = check_plan(pipe, replace(plan, components={name: other}), CASE, SETTINGS)
    assert found.heads and "configuration isn't the one" in found.notes[0]
    assert "the plan was made at" in found.notes[1]


def test_heads_that_no_step_reaches_are_counted(made):
    pipe, plan = made
    ((name, part),) = plan.components.items()
    late = tuple(replace(stage, progress_max=1e-6) for stage in part.stages)
    found = check_plan(
        pipe, replace(plan, components={name: replace(part, stages=late)}), CASE, SETTINGS
    )
    assert not found.heads and found.unseen == part.total_heads
    assert found.share == 0


def test_what_can_not_be_compared_is_refused(made):
    pipe, plan = made
    ((name, part),) = plan.components.items()
    layers = {f"blocks.{i}.other": heads for i, heads in enumerate(part.layers.values())}
    with pytest.raises(PlanError, match="layers must be in the model"):
        other = replace(part, layers=layers, heads=dict.fromkeys(layers, (2, 24)))
        check_plan(pipe, replace(plan, components={name: other}), CASE, SETTINGS)
    with pytest.raises(PlanError, match="has a part for 'other'"):
        check_plan(pipe, replace(plan, components={"other": part}), CASE, SETTINGS)
    fine = uniform_plan(pipe, Pattern(Window(1), cell=1), LAYOUT)
    with pytest.raises(NotImplementedError, match="whole tiles"):
        check_plan(pipe, fine, CASE, SETTINGS)
    with sparse_dit.patch(pipe, plan), pytest.raises(ValueError, match="is patched"):
        check_plan(pipe, plan, CASE, SETTINGS)
    broken = copy.deepcopy(pipe)
    with torch.no_grad():
        broken.transformer.blocks[0].attn1.to_v.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="gives NaN or Inf"):
        check_plan(broken, plan, CASE, SETTINGS)
    assert attachment_of(pipe.transformer) is None


def test_the_command(made, tmp_path, monkeypatch, capsys):
    pipe, plan = made
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("model")
    cases = {"calibration": [{"prompt": "a dog", "seed": 1}]}
    record = {**plan.provenance, "settings": SETTINGS.to_dict(), "cases": cases, "profile_steps": 4}
    replace(plan, provenance=record).save("plan.json")
    assert cli.run(["check", "model", "plan.json"]) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert f"0 of {len(plan.components['transformer'].layers) * 2} sparse heads" in said.out
    assert "'a dog'" in said.err
    strict = _with_errors(plan, dict.fromkeys(_places(plan), 0.0))
    replace(strict, provenance=record).save("strict.json")
    assert cli.run(["check", "model", "strict.json", "--prompt", "a cat", "--steps", "2"]) == 1
    said = capsys.readouterr()
    assert "blocks.1.attn1" in said.out and "search a new plan" in said.err
    assert cli.run(["check", "model", "strict.json", "--share", "1"]) == 0
    capsys.readouterr()
    assert cli.run(["check", "model", "plan.json", "--lora", "no.safetensors"]) == 2
    assert "there is no file no.safetensors" in capsys.readouterr().err
    plan.save("bare.json")
    assert cli.run(["check", "model", "bare.json", "--height", "64", "--width", "64"]) == 2
    assert "give --prompt TEXT" in capsys.readouterr().err


def _places(plan):
    ((_, part),) = plan.components.items()
    return [
        (layer, stage, head)
        for layer, stages in part.layers.items()
        for stage, heads in enumerate(stages)
        for head in range(len(heads))
    ]
