"""A model whose layers differ in heads and head_dim: patched, searched, checked, started from geometry."""

from dataclasses import replace

import pytest
from diffusers import LTXVideoTransformer3DModel

import sparse_dit
from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.integrations.diffusers import heads_of
from sparse_dit.integrations.families import FAMILIES
from sparse_dit.plan import Plan, PlanError
from sparse_dit.search import pricing, search_plan
from sparse_dit.search.check import check_plan
from sparse_dit.search.profile_file import read_profile
from sparse_dit.tables import show_plan
from tests.helpers.search_cases import accounts, stub_costs
from tests.helpers.tiny_pipelines import ltx

HEADS = {"transformer_blocks.0.attn1": (4, 8), "transformer_blocks.1.attn1": (2, 16)}
SETTINGS = GenerationSettings(32, 32, 9, steps=4, guidance=1.0, max_sequence_length=16)
CASE = Case("a quiet harbour", 3)


class MixedHeads(LTXVideoTransformer3DModel):
    """LTX's transformer with fewer and larger heads in its second layer."""


@pytest.fixture
def pipe(monkeypatch):
    family = replace(FAMILIES["LTXVideoTransformer3DModel"], heads=lambda config: HEADS)
    monkeypatch.setitem(FAMILIES, "MixedHeads", family)
    stub_costs(monkeypatch)
    stub = pricing.measure_cost

    def measured(layout, num_heads, head_dim, **options):  # larger heads take longer
        return replace(stub(layout, num_heads, head_dim, **options), dense=1e-4 * head_dim)

    monkeypatch.setattr(pricing, "measure_cost", measured)
    pipe, _ = ltx()
    pipe.transformer.__class__ = MixedHeads
    pipe.transformer.transformer_blocks[1].attn1.heads = 2
    return pipe


def test_it_is_searched_and_runs_what_was_found(pipe, tmp_path, capsys):
    assert heads_of(pipe.transformer) == HEADS
    file = tmp_path / "profile.safetensors"
    prompts = ["a cat plays the piano", "a dog runs"]
    searched = search_plan(
        pipe, prompts, held_out=["a red circle"], settings=SETTINGS, rows=8, max_error=0.4, profile=file
    )  # fmt: skip
    assert read_profile(file).components["transformer"].heads == HEADS
    plan = searched.plan
    assert plan.components["transformer"].heads == HEADS
    assert list(plan.cost) == ["4 heads of 8", "2 heads of 16"]
    assert {
        len(s) for s in plan.components["transformer"].layers["transformer_blocks.1.attn1"]
    } == {2}
    ran = accounts(pipe, plan, CASE, SETTINGS, tmp_path)["transformer"]
    assert {entry.layer for entry in ran if entry.backend} == HEADS.keys()
    checked = check_plan(pipe, plan, CASE, SETTINGS, rows=8)
    assert {head.layer for head in checked.heads} == HEADS.keys() and not checked.notes
    with pytest.raises(NotImplementedError, match=r"equally many heads, got \[2, 4\]"):
        _ = searched.profile.components["transformer"].num_heads
    show_plan(plan)
    assert "2 layers of 2 or 4 heads" in capsys.readouterr().out


def test_a_plan_from_geometry_has_the_heads_of_each_layer(pipe):
    plan = sparse_dit.geometric_plan(pipe, height=64, width=64, num_frames=9, steps=4)
    assert plan.components["transformer"].heads.items() <= HEADS.items()
    sparse_dit.patch(pipe, plan).remove()


def test_a_plan_of_equal_heads_does_not_fit(pipe):
    plan = sparse_dit.geometric_plan(pipe, height=64, width=64, num_frames=9, steps=4)
    part = plan.components["transformer"]
    layer = "transformer_blocks.1.attn1"
    choices = tuple(heads * 2 for heads in part.layers[layer])
    part = replace(part, heads={layer: (4, 8)}, layers={layer: choices})
    other = Plan(plan.pipeline_class, {"transformer": part}, plan.density)
    with pytest.raises(
        PlanError, match=f"number of heads must be 4 as in the plan, got 2 in {layer}"
    ):
        sparse_dit.patch(pipe, other)
