"""A plan's step cache: named, enabled with the patch, told in the summary, gone with it."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

from sparse_dit.cli import app
from sparse_dit.integrations.step_caches import enable_step_cache, enabled_step_cache
from sparse_dit.patch import patch, unpatch
from sparse_dit.patterns import Pattern, Window
from sparse_dit.plan import PlanError
from sparse_dit.step_cache import StepCache, asked_caches
from tests.helpers.tiny_pipelines import generate, wan
from tests.test_patch import plan_for

NARROW = Pattern(Window(frames=0, rows=1, columns=1), tile=(1, 2, 2))
FIRST_BLOCK = StepCache("first-block", {"threshold": 10.0})  # takes every step but the first again
TAYLORSEER = StepCache("taylorseer", {"interval": 2, "first": 2})


@pytest.fixture(scope="module")
def tiny():
    pipe, call = wan()
    call = {**call, "num_inference_steps": 5}
    return pipe, call, generate(pipe, call)


def _planned(pipe, cache):
    settings = {"steps": 5}
    return replace(
        plan_for(pipe, NARROW),
        provenance={"step_cache": cache.to_dict(), "settings": settings},
    )


@pytest.mark.parametrize("cache", [FIRST_BLOCK, TAYLORSEER], ids=str)
def test_it_is_enabled_with_the_patch_in_any_order_and_gone_with_it(tiny, cache):
    pipe, call, stock = tiny
    plan = _planned(pipe, cache)
    with patch(pipe, plan) as handle:
        both = generate(pipe, call)
        assert torch.equal(generate(pipe, call), both), "nothing is taken from another generation"
        assert f"step cache {cache}, as in the search" in str(handle.summary())
        calls = handle.summary().sparse_calls
        assert "was set for" not in str(handle.summary())
        generate(pipe, call, num_inference_steps=4)
        assert "was set for 5 steps, and 4 ran" in str(handle.summary())
    assert f"step cache {cache}, as in the search" in str(handle.summary())
    assert not pipe.transformer.is_cache_enabled
    assert torch.equal(generate(pipe, call), stock)
    layers = 2 * 2  # as many halves of guidance as layers
    computed = {"first-block": 2 * (5 + 1), "taylorseer": layers * 3}[cache.name]
    assert calls == 2 * computed  # in two generations

    enable_step_cache(pipe.transformer, cache)  # first the cache
    with patch(pipe, plan) as handle:
        assert torch.equal(generate(pipe, call), both)
        assert "as in the search" in str(handle.summary())
    assert enabled_step_cache(pipe.transformer) == cache, "it is the user's"
    pipe.transformer.disable_cache()

    with patch(pipe, plan, step_cache=False) as handle:  # first the patch
        sparse = generate(pipe, call)
        assert "and none is enabled, so its forecast doesn't hold" in str(handle.summary())
        assert not torch.equal(sparse, both)
        enable_step_cache(pipe.transformer, cache)
        assert torch.equal(generate(pipe, call), both)
    pipe.transformer.disable_cache()
    assert torch.equal(generate(pipe, call), stock)


@pytest.mark.parametrize("cache", [FIRST_BLOCK, TAYLORSEER], ids=str)
def test_an_interrupted_generation_leaves_nothing_in_it(tiny, cache):
    pipe, call, _ = tiny

    def interrupt(*_):
        raise KeyboardInterrupt

    with patch(pipe, _planned(pipe, cache)):
        both = generate(pipe, call)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, call, callback_on_step_end=interrupt)
        assert torch.equal(generate(pipe, call), both)


def test_another_cache_stays_and_is_told(tiny):
    pipe, _, _ = tiny
    config = TaylorSeerCacheConfig(use_lite_mode=True, cache_interval=3)
    pipe.transformer.enable_cache(config)
    with patch(pipe, _planned(pipe, FIRST_BLOCK)) as handle:
        told = str(handle.summary())
    assert "searched with the step cache first-block=10, and taylorseer=3:3 is enabled" in told
    assert pipe.transformer._cache_config is config
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(TaylorSeerCacheConfig())  # hooks nothing of a Wan
    assert enabled_step_cache(pipe.transformer) == "TaylorSeerCacheConfig"
    pipe.transformer.disable_cache()


def test_a_copy_has_its_own(tiny):
    pipe, _, _ = tiny
    with patch(pipe, _planned(pipe, FIRST_BLOCK)):
        other = copy.deepcopy(pipe.transformer)
        unpatch(other)
        assert not other.is_cache_enabled
        assert pipe.transformer.is_cache_enabled
    assert not pipe.transformer.is_cache_enabled


def test_what_isnt_one_is_refused_before_anything_is_patched(tiny):
    with pytest.raises(TypeError, match="step_cache must be True or False, got 'first-block'"):
        patch(tiny[0], _planned(tiny[0], FIRST_BLOCK), step_cache="first-block")
    pipe, _, _ = tiny
    plan = plan_for(pipe, NARROW)
    for found, message in (
        ({"name": "tea"}, r"provenance.step_cache: a step cache must be one of .*, got 'tea'"),
        ({"name": "first-block"}, r"first-block must have the settings \['threshold'\], got \{\}"),
        (
            {"name": "first-block", "threshold": -1},
            "threshold of .* must be a finite number above 0",
        ),
        ({"name": "taylorseer", "interval": 1, "first": 2}, "interval of .* a whole number >= 2"),
        (7, "provenance.step_cache: "),
    ):
        with pytest.raises(PlanError, match=message):
            patch(pipe, replace(plan, provenance={"step_cache": found}))
    del_head = copy.deepcopy(pipe.transformer)
    del_head.proj_out = None
    with pytest.raises(ValueError, match="has no proj_out for taylorseer; try first-block"):
        patch(del_head, _planned(pipe, TAYLORSEER))
    unpatch(del_head)
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="has a step cache already"):
        enable_step_cache(pipe.transformer, FIRST_BLOCK)
    pipe.transformer.disable_cache()


def test_what_is_asked_for_is_read_from_text():
    assert [str(one) for one in asked_caches("first-block=0.12", 12)] == ["first-block=0.12"]
    assert [str(one) for one in asked_caches("first-block=3e-2", 12)] == ["first-block=0.03"]
    assert [str(one) for one in asked_caches("taylorseer=2", 12)] == ["taylorseer=2:3"]
    assert [str(one) for one in asked_caches("taylorseer=3:5", 12)] == ["taylorseer=3:5"]
    bolder = [one.settings["threshold"] for one in asked_caches("first-block", 50)]
    assert bolder == sorted(bolder)
    assert str(asked_caches("taylorseer", 50)[0]) == "taylorseer=2:25"
    few = [str(one) for one in asked_caches("taylorseer", 12)]
    assert few[:4] == ["taylorseer=2:7", "taylorseer=2:5", "taylorseer=2:3", "taylorseer=3:3"]
    for text in ("tea", "first-block=", "first-block=a", "first-block=1:2", "taylorseer=1:2:3"):
        with pytest.raises(ValueError, match=r"step cache must be one of|must be \S+=[A-Z]"):
            asked_caches(text, 12)
    for number in ("0", "1", "2.5", "1.e999", "1" + "0" * 400):
        with pytest.raises(
            ValueError, match="interval of the step cache taylorseer must be a whole"
        ):
            asked_caches(f"taylorseer={number}", 12)


@pytest.mark.parametrize(("steps", "names"), [(3, "2:2"), (4, "2:3"), (6, "2:3 3:2")])
def test_settings_that_compute_the_same_steps_are_tried_once(steps, names):
    found = asked_caches("taylorseer", steps)
    assert [f"{c.settings['interval']}:{c.settings['first']}" for c in found] == names.split()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 12, 50])
def test_whether_the_numbers_alone_leave_out_a_step_is_known_before(steps):
    for text in ("taylorseer", "taylorseer=2", "taylorseer=6", f"taylorseer=2:{steps}"):
        if steps > 2 and ":" not in text:
            assert all(2 <= one.settings["first"] < steps for one in asked_caches(text, steps))
            continue
        with pytest.raises(ValueError, match=f"must be|leaves out none of {steps} steps"):
            asked_caches(text, steps)


def test_show_prints_it_with_what_was_compared(tiny, tmp_path, capsys):
    pipe, _, _ = tiny
    row = {"what": "both", "cache": "taylorseer=2:2", "density": 0.25, "computed": 0.6}
    row |= {"psnr_db": 31.0, "psnr_db_least": 30.0, "speedup": 2.5}
    plan = _planned(pipe, TAYLORSEER)
    plan = replace(plan, provenance={**plan.provenance, "compared": [row, {"what": "odd"}, 3]})
    plan.save(tmp_path / "plan.json")
    with pytest.raises(SystemExit) as ended:
        app(["show", str(tmp_path / "plan.json")])
    told = capsys.readouterr().out
    assert not ended.value.code
    assert "searched with the step cache taylorseer=2:2" in told
    assert "31.0 dB (30.0)" in told
    assert "2.50x" in told
    assert "odd" not in told
