"""`patch(pipe, "auto", verify=True)`: the generation that a plan was learned from is made again by it."""

import copy

import numpy as np
import pytest
import torch

import sparse_dit
from sparse_dit.auto import PlanStore
from tests.helpers.search_cases import stub_costs
from tests.helpers.tiny_pipelines import wan


@pytest.fixture
def tiny(monkeypatch):
    stub_costs(monkeypatch)
    monkeypatch.setattr("sparse_dit.auto.learner.inside", lambda tables, *measured: tables)
    pipe, call = wan()
    call = {name: value for name, value in call.items() if name != "latents"}
    return pipe, {**call, "num_inference_steps": 3, "output_type": "np"}


def made(pipe, call, seed):
    return np.asarray(pipe(**call, generator=torch.Generator().manual_seed(seed)).frames[0])


def difference_db(a, b):
    return -10 * np.log10(np.mean((a - b) ** 2))


def test_the_plan_is_measured_on_the_generation_it_was_learned_from(tiny, tmp_path):
    pipe, call = tiny
    stock, cls = made(pipe, call, 0), type(pipe)
    handle = sparse_dit.patch(pipe, "auto", cache=tmp_path, min_psnr=20.0, verify=True)
    assert type(pipe).__name__ == cls.__name__ and isinstance(pipe, cls)
    generator = torch.Generator().manual_seed(0)
    first = np.asarray(pipe(**call, generator=generator).frames[0])
    assert np.array_equal(first, stock), "the user gets the dense one"
    after = generator.get_state()
    sparse = made(pipe, call, 0)
    told = handle.plan.measured["psnr_db"]
    assert told == pytest.approx(difference_db(sparse, stock), abs=2e-3)
    assert told >= 20.0 or handle.plan.measured["speedup"] > 0
    assert f"verified: {told:.1f} dB" in "".join(handle.summary().notes)
    (kept,) = PlanStore(tmp_path)
    assert kept.plan.measured == handle.plan.measured
    generator = torch.Generator().manual_seed(0)
    handle.remove()
    assert type(pipe) is cls
    pipe(**call, generator=generator)
    assert torch.equal(generator.get_state(), after), "random numbers go on as without it"


def test_a_plan_that_is_too_good_or_too_bad_is_corrected(tiny, tmp_path, monkeypatch):
    pipe, call = tiny
    monkeypatch.setattr("sparse_dit.auto.learner.MARGIN_DB", 20.0)  # far more careful than needed
    careful = sparse_dit.patch(pipe, "auto", cache="", min_psnr=20.0)
    made(pipe, call, 0)
    density = careful.plan.density
    careful.remove()
    with sparse_dit.patch(pipe, "auto", cache="", min_psnr=20.0, verify=True) as handle:
        made(pipe, call, 0)
        assert handle.plan.density < density < 1


def test_global_random_numbers_go_on_and_callbacks_come_once_a_step(tiny):
    pipe, call = tiny
    steps = []

    def note(pipe, step, timestep, tensors):
        steps.append(step)
        return tensors

    torch.manual_seed(3)
    want = np.asarray(pipe(**call).frames[0]), torch.rand(1)
    with sparse_dit.patch(pipe, "auto", cache="", min_psnr=20.0, verify=True) as handle:
        torch.manual_seed(3)
        got = np.asarray(pipe(**call, callback_on_step_end=note).frames[0]), torch.rand(1)
        assert handle.plan.measured
    assert np.array_equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert steps == [0, 1, 2]


def test_what_cant_be_compared_is_told(tiny):
    pipe, call = tiny
    with sparse_dit.patch(pipe, "auto", cache="", min_psnr=20.0, verify=True) as handle:
        pipe(**{**call, "output_type": "latent"})
        assert handle.plan is not None and not handle.plan.measured
        assert "not verified: what isn't pixels" in "".join(handle.summary().notes)


def test_copies_are_of_the_stock_class(tiny):
    pipe, _ = tiny
    cls = type(pipe)
    with sparse_dit.patch(pipe, "auto", cache="", min_psnr=20.0, verify=True):
        other = copy.deepcopy(pipe)
        assert type(other) is cls and type(pipe) is not cls
        sparse_dit.unpatch(other)
        assert type(pipe) is not cls
        sparse_dit.unpatch(pipe)
        assert type(pipe) is cls


def test_a_transformer_alone_cant_generate(tiny):
    with pytest.raises(TypeError, match="takes the pipeline"):
        sparse_dit.patch(tiny[0].transformer, "auto", verify=True)
