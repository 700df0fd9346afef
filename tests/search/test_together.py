"""The search of sparse attention together with a step cache."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import sparse_dit
from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.integrations.step_caches import enable_step_cache
from sparse_dit.patterns import Dense, Pattern, Window
from sparse_dit.plan import Plan, Stage
from sparse_dit.search import caching, engine, search_plan, together
from sparse_dit.search.caching import Cached, measured_scale, tried, with_cache
from sparse_dit.search.front import pick
from sparse_dit.search.options import SearchOptions
from sparse_dit.search.solve import Problem, evaluate
from sparse_dit.search.verify import Reference
from sparse_dit.step_cache import StepCache, asked_caches
from sparse_dit.timing import Pairs, Taken
from tests.helpers import tiny_pipelines
from tests.helpers.search_cases import stub_costs

SETTINGS = GenerationSettings(64, 64, 17, steps=6, guidance=1.0, max_sequence_length=16)
PROMPTS, HELD_OUT = ("a cat plays the piano", "a dog runs"), ("a red circle moves left",)
LAYER = "blocks.0.attn1"
STAGES = (Stage(1.0, 0.6), Stage(0.6, 0.3), Stage(0.3, 0.0))
SIGMAS = [0.9, 0.8, 0.5, 0.4, 0.2, 0.1]


def _search(pipe, **options):
    asked = {"held_out": HELD_OUT, "settings": SETTINGS, "rows": 16, "profile_steps": 2}
    return search_plan(pipe, PROMPTS, **{**asked, **options})


def _calls(runs):
    """Calls of generations, for their seconds outside of attention, which a busy machine falsifies."""
    layers = [sigmas for run in runs for part in run.by_layer.values() for sigmas in part.values()]
    return float(sum(map(len, layers)))


@pytest.fixture
def pipe(monkeypatch):
    stub_costs(monkeypatch)
    monkeypatch.setattr(caching, "_outside", _calls)
    monkeypatch.setattr(engine, "dense_generation", lambda *measured: 1.0)
    monkeypatch.setattr(together, "_speed", lambda one: one.choice.speedup)
    return tiny_pipelines.wan()[0]


def test_a_search_sets_the_cache_verifies_against_dense_steps_and_says_what_each_gave(
    pipe, tmp_path
):
    said = []
    searched = _search(pipe, cache="taylorseer", min_psnr=20.0, report=said.append)
    plan, task = searched.plan, searched.problem
    assert not pipe.transformer.is_cache_enabled
    assert sparse_dit.integrations.attachment_of(pipe.transformer) is None
    rows = plan.provenance["compared"]
    ways = [row["what"] for row in rows]
    assert ways[0] == "sparse alone"
    assert {"cache alone", "both"} <= set(ways)
    both = next(row for row in rows if row["what"] == "both")
    cache = StepCache.of(plan)
    assert str(cache) == both["cache"]
    assert plan.measured["psnr_db"] == pytest.approx(both["psnr_db"], abs=0.01)
    assert plan.measured["met"]
    # the forecast counts the steps that are computed
    alone = next(row for row in rows if row["cache"] == both["cache"] and row is not both)
    assert task.ran is not None
    assert task.ran.mean().item() == pytest.approx(alone["computed"], abs=0.2)
    assert searched.choice.seconds < task.dense_seconds
    assert any(f"step cache {cache} alone" in line for line in said)
    # another point of the front has it too, and eval and serve run what patch runs
    other = pick(plan, searched.front, "speedup", 1.01)
    other.save(tmp_path / "plan.json")
    assert StepCache.of(Plan.load(tmp_path / "plan.json")) == cache


def test_a_speed_up_may_come_from_both_where_sparse_attention_alone_is_too_slow(pipe):
    said = []
    searched = _search(pipe, cache="taylorseer=2:2", target_speedup=1.2, report=said.append)
    assert any(line.startswith("without a step cache: target_speedup 1.2 is out") for line in said)
    assert str(StepCache.of(searched.plan)) == "taylorseer=2:2"
    assert searched.plan.forecast["speedup"] >= 1.2


def test_a_cache_alone_that_is_faster_than_with_sparse_attention_is_what_is_written(
    pipe, monkeypatch, tmp_path
):
    # as where sparse attention is slower than it is forecast to be
    monkeypatch.setattr(together, "_speed", lambda one: one.choice.density)
    said = []
    searched = _search(pipe, cache="taylorseer=2:2", min_psnr=20.0, report=said.append)
    assert searched.plan.density == 1.0
    assert searched.plan.measured["met"]
    (row,) = [row for row in searched.plan.provenance["compared"] if row["what"] == "cache alone"]
    assert searched.plan.measured["psnr_db"] == pytest.approx(row["psnr_db"], abs=0.01)
    assert any("taylorseer=2:2 alone is better" in line for line in said)
    assert searched.front.points
    searched.plan.save(tmp_path / "plan.json")
    with sparse_dit.patch(pipe, Plan.load(tmp_path / "plan.json")) as handle:
        assert "step cache taylorseer=2:2, as in the search" in str(handle.summary())


def test_a_cache_that_leaves_nothing_out_is_no_part_of_a_plan(pipe):
    said = []
    searched = _search(pipe, cache="first-block=1e-9", min_psnr=20.0, report=said.append)
    assert StepCache.of(searched.plan) is None
    assert any(line.endswith("it leaves nothing out") for line in said)
    assert any(line.startswith("no step cache makes the plan faster") for line in said)


def _tuned(psnr, speedup, seconds=1.0, **goal):
    options = SimpleNamespace(**{"min_psnr": None, "target_speedup": None, **goal})
    options.target_device = None
    return together.Tuned(
        SimpleNamespace(options=options),
        SimpleNamespace(seconds=seconds, speedup=1 / seconds),
        None,
        SimpleNamespace(difference={"psnr_db": psnr}, speedup=speedup),
    )


@pytest.mark.parametrize(
    ("goal", "alone", "both", "cache", "best"),
    [
        # PSNR, measured speed-up, forecast seconds
        ({"min_psnr": 22.0}, (25, 1.1, 0.9), (22.9, 1.36, 0.5), (31.5, 1.50, 0.7), "cache"),
        ({"min_psnr": 22.0}, (25, 1.1, 0.9), (22.9, 1.60, 0.5), (31.5, 1.50, 0.7), "both"),
        ({"min_psnr": 30.0}, (25, 1.1, 0.9), (29.0, 1.60, 0.5), (31.5, 1.50, 0.7), "cache"),
        ({"min_psnr": 30.0}, (31, 1.1, 0.9), (29.0, 1.60, 0.5), (28.5, 1.50, 0.7), "alone"),
        ({"min_psnr": 30.0}, (25, 1.1, 0.9), None, (28.5, 1.50, 0.7), "cache"),
        ({"target_speedup": 1.4}, (20, 1.4, 0.7), (29.0, 1.45, 0.7), (31.5, 1.50, 0.7), "cache"),
        ({"target_speedup": 1.4}, (20, 1.4, 0.7), (29.0, 1.45, 0.7), (31.5, 1.30, 0.8), "both"),
        ({"target_speedup": 2.0}, (20, 1.4, 0.5), (19.0, 1.45, 0.5), (31.5, 1.30, 0.8), "alone"),
        ({"target_speedup": 2.0}, None, None, (31.5, 1.30, 0.8), None),
    ],
)
def test_the_best_of_a_plan_alone_a_cache_alone_and_both(goal, alone, both, cache, best):
    tuned = {
        name: None if one is None else _tuned(*one, **goal)
        for name, one in {"alone": alone, "both": both, "cache": cache}.items()
    }
    found = together._best(tuned["alone"], tuned["both"], [tuned["cache"]])
    assert found is (None if best is None else tuned[best])


def test_what_doesnt_go_is_told_before_anything_runs(pipe):
    for options, kind, message in (
        ({"cache": "tea"}, ValueError, "a step cache must be one of"),
        ({"cache": 3}, TypeError, "cache must be text"),
        ({"cache": "taylorseer=2:99"}, ValueError, "leaves out none of 6 steps: the first 99 are"),
        ({"cache": "first-block", "min_psnr": None, "max_error": 0.1}, ValueError, "goes with"),
    ):
        with pytest.raises(kind, match=message):
            SearchOptions(**{"settings": SETTINGS, "min_psnr": 30.0, **options})
    enable_step_cache(pipe.transformer, asked_caches("first-block=1", 6)[0])
    with pytest.raises(ValueError, match="has a step cache already, and a search compares"):
        _search(pipe, cache="first-block", min_psnr=30.0)
    assert sparse_dit.integrations.attachment_of(pipe.transformer) is None


def _run(sigmas, seconds, attention):
    taken = Taken(seconds, seconds)
    by_layer = {"transformer": {LAYER: sigmas}}
    return Reference(
        Case("a"), None, taken, {"transformer": SIGMAS}, {"transformer": attention}, by_layer
    )


def _cached(sigmas, name="first-block=1"):
    (cache,) = asked_caches(name, 6)
    run = _run(sigmas, 6.0, 3.0)
    return Cached(cache, [run], Pairs([run.taken], [run.taken]), ({"mse": 1e-3},), 0.5)


def _problem():
    """One head at three noise levels; sparse costs half."""
    seconds = torch.tensor([[2.0, 1.0]], dtype=torch.float64).expand(3, 2).contiguous()
    error = torch.tensor([[0.0, 0.1]], dtype=torch.float64).expand(3, 2)
    return Problem(
        [(stage, LAYER, 0) for stage in range(3)],
        [(Pattern(Dense()), Pattern(Window(1)))] * 3,
        torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64),
        seconds,
        seconds[:, 0],
        error,
        seconds / 2,
        1 - error,
        torch.full((3,), 1 / 3, dtype=torch.float64),
        STAGES,
        4.0,
        ("transformer",) * 3,
    )


def test_steps_that_are_taken_again_cost_nothing_and_spoil_what_they_are_taken_from():
    task, reference = _problem(), _run(SIGMAS, 10.0, 6.0)
    found = with_cache(task, [reference], _cached([0.9, 0.8, 0.5]))  # none in the last stage
    assert found.ran.tolist() == [1.0, 0.5, 0.0]
    assert found.importance.tolist() == [1.0, 6.0, 0.0]  # the last stage's is the middle one's
    assert found.seconds.tolist() == [[2.0, 1.0], [1.0, 0.5], [0.0, 0.0]]
    assert found.other_seconds == pytest.approx(4.0 * 3 / 4)
    assert found.dense_seconds == pytest.approx(task.dense_seconds)
    all_dense = evaluate(found, torch.zeros(3, dtype=torch.int64))
    assert all_dense.seconds == pytest.approx(3.0 + 3.0)
    assert all_dense.speedup == pytest.approx(10 / 6)
    assert all_dense.density == pytest.approx(1.0)
    same = with_cache(task, [reference], _cached(SIGMAS))
    assert torch.equal(same.importance, task.importance)
    assert torch.equal(same.seconds, task.seconds)


@pytest.mark.parametrize(
    ("good", "looked_at"), [(0, [3, 2, 1, 0]), (3, [3, 4, 2]), (5, [3, 4, 5, 6])]
)
def test_caches_are_tried_from_the_middle_on(monkeypatch, good, looked_at):
    caches = asked_caches("first-block", 50)
    seen, work = [], SimpleNamespace()

    def alone(work, references, cache):
        return replace(_cached(SIGMAS), cache=cache)

    def place(one):
        return caches.index(one.cache)

    monkeypatch.setattr(caching, "cached_alone", alone)
    found = tried(
        work, [], caches, lambda one: place(one) > good, lambda one: seen.append(place(one))
    )
    assert seen == looked_at
    assert [place(one) for one in found] == sorted(seen)


def test_a_cache_alone_is_taken_off_what_was_measured():
    assert measured_scale(3e-3, 1e-3, 1e-3) == pytest.approx(2.0)
    assert measured_scale(3e-3, 1e-3) == pytest.approx(3.0)
    assert measured_scale(1e-3, 1e-3, 2e-3) == pytest.approx(0.1), "errors that cancel"
    assert replace(_problem(), saved_seconds=2.0).dense_seconds == pytest.approx(12.0)
    assert math.isfinite(measured_scale(0.0, 1e-3))
