"""`patch(pipe, "auto")`: the first generation is stock's and is learned from, later ones follow a plan."""

import copy
import gc
import logging

import pytest
import torch
from filelock import FileLock

import sparse_dit
from sparse_dit.auto import PlanStore
from sparse_dit.auto.session import LEARNING
from sparse_dit.integrations import components
from sparse_dit.plan import Plan
from tests.helpers.search_cases import stub_costs
from tests.helpers.tiny_language_models import text
from tests.helpers.tiny_pipelines import generate, wan

SPEED = {"target_speedup": 1.05}


@pytest.fixture(autouse=True)
def costs(monkeypatch):
    stub_costs(monkeypatch)
    monkeypatch.setattr("sparse_dit.auto.learner.inside", lambda tables, *measured: tables)


@pytest.fixture(params=[False, True], ids=["one", "two transformers"])
def tiny(request):
    pipe, call = wan(second=request.param)
    return pipe, {**call, "num_inference_steps": 3}


@pytest.fixture
def single():
    pipe, call = wan()
    return pipe, {**call, "num_inference_steps": 3}


def learning(summary):
    return any(LEARNING in stage.dense_calls for stage in summary.stages)


def test_the_first_generation_is_stock_and_later_ones_follow_a_plan(tiny, tmp_path):
    pipe, call = tiny
    want = [generate(pipe, call, seed) for seed in range(2)]
    with sparse_dit.patch(pipe, "auto", cache=tmp_path, min_psnr=10.0) as handle:
        assert torch.equal(generate(pipe, call, 0), want[0])
        summary = handle.summary()
        assert summary.sparse_calls == 0 and learning(summary)
        got = generate(pipe, call, 1)
        assert not torch.equal(got, want[1]) and got.isfinite().all()
        plan = handle.plan
        assert (
            plan is not None and plan.density < 1 and set(plan.components) == set(components(pipe))
        )
        assert (
            handle.summary().sparse_calls > 0 and handle.summary().planned_density == plan.density
        )
        assert "learned from 1 generations" in "".join(handle.summary().notes)
    assert torch.equal(generate(pipe, call, 1), want[1]), "stock again"
    (kept,) = PlanStore(tmp_path)
    assert kept.plan.to_dict() == plan.to_dict()


def test_a_kept_plan_serves_the_next_process_from_its_first_generation(single, tmp_path):
    pipe, call = single
    with sparse_dit.patch(pipe, "auto", cache=tmp_path, min_psnr=10.0) as handle:
        generate(pipe, call, 0)
        assert handle.plan is not None, "made on demand, once the generation is over"
    stock = generate(pipe, call, 1)
    with sparse_dit.patch(pipe, "auto", cache=tmp_path, min_psnr=10.0) as handle:
        assert not torch.equal(generate(pipe, call, 1), stock)
        assert handle.summary().sparse_calls > 0
    with sparse_dit.patch(pipe, "auto", cache=tmp_path, min_psnr=20.0) as handle:
        assert torch.equal(generate(pipe, call, 1), stock), "another objective is another plan"


def test_each_size_is_learned_for_itself(single, tmp_path):
    pipe, call = single
    large = {**call, "height": 96, "width": 96}
    want = generate(pipe, large, 0)
    with sparse_dit.patch(pipe, "auto", cache=tmp_path, min_psnr=10.0) as handle:
        generate(pipe, call, 0)
        assert torch.equal(generate(pipe, large, 0), want)
        generate(pipe, call, 1)
        assert handle.summary().sparse_calls > 0
        generate(pipe, large, 1)
        assert len(handle.summary().notes) == 2
        assert handle.plan is not None and handle.plan.components["transformer"].layout.grid[1] == 6
    assert len(list(PlanStore(tmp_path))) == 2


def test_a_generation_that_was_cut_off_is_learned_anew(single, tmp_path):
    pipe, call = single

    def stop(pipe, step, timestep, arguments):
        if step == 0:
            raise KeyboardInterrupt
        return arguments

    want = generate(pipe, call, 1)
    with sparse_dit.patch(pipe, "auto", cache=tmp_path, min_psnr=10.0) as handle:
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, call, 0, callback_on_step_end=stop)
        assert handle.plan is None
        assert torch.equal(generate(pipe, call, 1), want), "dense once more"
        generate(pipe, call, 0)
        assert handle.summary().sparse_calls > 0


def test_other_prompts_refine_the_plan(single, tmp_path):
    pipe, call = single
    with sparse_dit.patch(pipe, "auto", cache=tmp_path, min_psnr=10.0) as handle:
        for seed in range(5):
            generate(pipe, {**call, "prompt": f"prompt {seed}"}, seed)
        assert handle.plan is not None
        assert handle.plan.provenance["learned_from"] == 4
    (kept,) = PlanStore(tmp_path)
    assert kept.plan.provenance["learned_from"] == 4


@pytest.fixture
def processes(monkeypatch):
    """Sessions that belong to no process that still runs: what would run at the end of one."""
    from sparse_dit.auto import session

    def ended():
        session._settle()
        session._SESSIONS.clear()

    return ended


def test_a_plan_is_refined_over_processes_that_generate_once(single, tmp_path, processes):
    pipe, call = single
    for number, learned in enumerate((None, 1, 2, 3)):  # a plan is made of it as the next begins
        handle = sparse_dit.patch(pipe, "auto", cache=tmp_path, min_psnr=10.0)
        generate(pipe, {**call, "prompt": f"prompt {number}"}, number)
        processes()
        kept = list(PlanStore(tmp_path))
        assert [k.plan.provenance["learned_from"] for k in kept] == ([learned] if learned else [])
        assert len(list(tmp_path.glob("*.profile.safetensors"))) == 1
        sparse_dit.unpatch(pipe)
        assert handle.summary().sparse_calls > 0 or not learned
    with sparse_dit.patch(pipe, "auto", cache=tmp_path, min_psnr=10.0) as handle:
        generate(pipe, call, 9)
        assert handle.plan.provenance["learned_from"] == 4
    assert not list(tmp_path.glob("*.profile.safetensors")), "it is learned"


def test_what_was_learned_is_as_in_one_process(single, tmp_path, processes):
    pipe, call = single
    plans = []
    for folder, apart in ((tmp_path / "one", False), (tmp_path / "two", True)):
        handle = sparse_dit.patch(pipe, "auto", cache=folder, min_psnr=10.0)
        for seed in range(3):
            generate(pipe, {**call, "prompt": f"prompt {seed}"}, seed)
            if apart:
                processes()
                sparse_dit.unpatch(pipe)
                handle = sparse_dit.patch(pipe, "auto", cache=folder, min_psnr=10.0)
        generate(pipe, call, 3)
        plans.append(handle.plan)
        sparse_dit.unpatch(pipe)
    assert [c.layers for c in plans[0].components.values()] == [
        c.layers for c in plans[1].components.values()
    ]


def test_a_damaged_profile_is_not_gone_on_with(single, tmp_path, processes, caplog):
    pipe, call = single
    sparse_dit.patch(pipe, "auto", cache=tmp_path, min_psnr=10.0)
    generate(pipe, call, 0)
    processes()
    sparse_dit.unpatch(pipe)
    (file,) = tmp_path.glob("*.profile.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    with sparse_dit.patch(pipe, "auto", cache=tmp_path, min_psnr=10.0) as handle:
        generate(pipe, call, 0)
        assert handle.plan is not None
    assert "what was learned can't be read and is learned again" in caplog.text


def test_a_model_that_changes_is_learned_anew(single, tmp_path):
    pipe, call = single
    with sparse_dit.patch(pipe, "auto", cache=tmp_path, min_psnr=10.0) as handle:
        generate(pipe, call, 0)
        generate(pipe, call, 1)
        assert handle.plan is not None
        with torch.no_grad():
            pipe.transformer.blocks[0].attn1.to_q.weight += 0.5
        generate(pipe, call, 1)
        assert learning(handle.summary())
    assert len(list(PlanStore(tmp_path))) == 2


def test_a_copy_learns_for_itself(single, tmp_path):
    pipe, call = single
    with sparse_dit.patch(pipe, "auto", cache=tmp_path, min_psnr=10.0) as handle:
        other = copy.deepcopy(pipe)
        generate(other, call, 0)
        assert handle.summary().dense_calls == 0
        sparse_dit.unpatch(other)


def test_what_a_copy_learned_is_kept_at_the_end_of_the_process(single, tmp_path, processes):
    pipe, call = single
    with sparse_dit.patch(pipe, "auto", cache=tmp_path, min_psnr=10.0):
        other = copy.deepcopy(pipe)
        generate(other, call, 0)
        assert not list(tmp_path.iterdir())
        processes()
        assert list(tmp_path.glob("*.profile.safetensors"))


def test_a_model_that_goes_before_its_process_ends_has_learned(single, tmp_path):
    pipe, call = single
    other = copy.deepcopy(pipe)
    sparse_dit.patch(other, "auto", cache=tmp_path, min_psnr=10.0)
    generate(other, call, 0)
    assert not list(tmp_path.iterdir())
    del other
    gc.collect()
    assert list(tmp_path.glob("*.profile.safetensors"))


def test_what_is_recorded_must_be_finite(single, tmp_path, caplog):
    pipe, call = single
    with torch.no_grad():
        pipe.transformer.blocks[1].attn1.to_k.weight.fill_(torch.nan)
    with sparse_dit.patch(pipe, "auto", cache=tmp_path) as handle, caplog.at_level(logging.WARNING):
        pipe(**call)
        pipe(**call)
        assert handle.plan is None and "no plan could be learned" in str(handle.summary())
    assert sum("no plan could be learned" in r.message for r in caplog.records) == 1


def test_an_objective_out_of_reach_leaves_it_dense(single, tmp_path, caplog):
    pipe, call = single
    with sparse_dit.patch(pipe, "auto", cache=tmp_path, target_speedup=1e6) as handle:
        generate(pipe, call, 0)
        assert handle.plan is None
        assert "target_speedup 1e+06 is out of reach" in str(handle.summary())
        generate(pipe, call, 1)
        assert handle.summary().sparse_calls == 0


@pytest.mark.parametrize("harm", ["garbage", "another version", "a folder"])
def test_a_broken_file_in_the_store_is_learned_over(single, tmp_path, harm, caplog):
    pipe, call = single
    with sparse_dit.patch(pipe, "auto", cache=tmp_path, min_psnr=10.0) as handle:
        generate(pipe, call, 0)
        assert handle.plan is not None
    (kept,) = PlanStore(tmp_path)
    if harm == "garbage":
        kept.file.write_text("{")
    elif harm == "another version":
        kept.file.write_text(kept.file.read_text().replace('"version": 3', '"version": 99'))
    else:
        kept.file.unlink()
        kept.file.mkdir()
    with sparse_dit.patch(pipe, "auto", cache=tmp_path, min_psnr=10.0) as handle:
        generate(pipe, call, 0)
        assert handle.plan is not None
    if harm != "a folder":
        assert Plan.load(kept.file).to_dict() == handle.plan.to_dict()
        assert "can't be read and is learned again" in caplog.text


def test_a_store_that_cannot_be_written_costs_one_line(single, tmp_path, caplog):
    pipe, call = single
    (tmp_path / "file").write_text("")
    with sparse_dit.patch(pipe, "auto", cache=tmp_path / "file" / "x", min_psnr=10.0) as handle:
        generate(pipe, call, 0)
        generate(pipe, call, 1)
        assert handle.summary().sparse_calls > 0
    assert sum("can't be kept" in r.message for r in caplog.records) == 1


def test_two_processes_that_learn_at_once(single, tmp_path):
    pipe, call = single
    with sparse_dit.patch(pipe, "auto", cache=tmp_path, min_psnr=10.0) as handle:
        generate(pipe, call, 0)
        (size,) = handle._learning.sizes.values()
        tmp_path.mkdir(exist_ok=True)
        with FileLock(tmp_path / f"{size.name}.json.lock"):  # another's
            assert handle.plan is not None
    assert list(PlanStore(tmp_path)) == []


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"min_psnr": 30.0, "target_speedup": 2.0}, ValueError, "give one of"),
        ({"min_psnr": -1.0}, ValueError, "min_psnr must be a finite number above 0"),
        ({"density": 0.3}, TypeError, "density"),
    ],
)
def test_bad_options(single, given, error, message):
    pipe, _ = single
    with pytest.raises(error, match=message):
        sparse_dit.patch(pipe, "auto", **given)
    assert sparse_dit.patch(pipe, "exact").remove() is None, "nothing was attached"


def test_options_belong_to_auto_and_language_models_are_searched(single):
    pipe, _ = single
    with pytest.raises(TypeError, match="min_psnr can be given with 'auto' and"):
        sparse_dit.patch(pipe, "exact", min_psnr=30.0)
    with pytest.raises(TypeError, match='"auto" learns from a diffusers pipeline'):
        sparse_dit.patch(text("llama")[0], "auto")
