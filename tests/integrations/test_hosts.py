"""A search, a patch and a check of a model that is of neither diffusers nor transformers."""

import math

import pytest
import torch

import sparse_dit
from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.integrations import HOSTS, attachment_of, host_of, workload
from sparse_dit.plan import Plan
from sparse_dit.search.check import check_plan
from sparse_dit.search.profile_file import read_profile
from tests.helpers import toy_host
from tests.helpers.search_cases import stub_costs
from tests.helpers.toy_host import Toy

SETTINGS = GenerationSettings(8, 8, 4, steps=6)


@pytest.fixture
def toy(monkeypatch):
    """The model, and no other host to fall back on."""
    monkeypatch.setitem(HOSTS, "diffusers", "no such module")
    monkeypatch.setitem(HOSTS, "tests", "tests.helpers.toy_host")
    torch.manual_seed(0)
    return Toy()


def test_a_whole_search_of_a_model_of_no_library(toy, monkeypatch, tmp_path):
    stub_costs(monkeypatch)
    said, path, profile = [], tmp_path / "plan.json", tmp_path / "profile.safetensors"
    found = sparse_dit.search(
        toy,
        ["one", "two"],
        tune_on="calibration",
        settings=SETTINGS,
        max_error=0.4,
        profile_steps=3,
        rows=16,
        profile=profile,
        report=said.append,
    )
    found.save(path)
    plan = Plan.load(path)
    assert 0 < plan.density < 1 and list(plan.components) == ["toy"]
    assert 0 < plan.measured["kl"] < 1 and "psnr_db" not in plan.measured
    assert any("at kl 0.0" in text for text in said)
    reference = read_profile(profile).reference
    assert reference is not None and reference.case.prompt == "two"
    work, case = workload(toy, SETTINGS), Case("four", 4)
    dense, _ = work.run(case)
    with sparse_dit.patch(toy, plan) as handle:
        sparse, _ = work.run(case)
    (ran,) = handle.ran.values()
    assert {entry.layer for entry in ran if entry.dense_because is None} == {"layers.0", "layers.1"}
    assert 0 < work.difference(sparse, dense)["kl"] < 1
    assert attachment_of(toy) is None and (work.run(case)[0] == dense).all()
    checked = check_plan(toy, plan, case, SETTINGS, rows=16)
    assert checked.heads and not checked.notes and math.isfinite(checked.share)


def test_a_psnr_is_not_to_be_had_of_words(toy):
    with pytest.raises(ValueError, match=r"min_psnr.*kl is measured"):
        sparse_dit.search(toy, ["one", "two"], settings=SETTINGS, min_psnr=30)


def test_the_class_tells_the_host(toy):
    class Derived(Toy):
        pass

    Derived.__module__ = "somewhere"
    assert host_of(toy) is host_of(Derived()) is toy_host
    with pytest.raises(ModuleNotFoundError, match="no such module"):
        host_of(torch.nn.Linear(1, 1))
