"""The search end to end on tiny random pipelines: dials, resuming, bad input, nothing left behind."""

import functools
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_dit
from sparse_dit.eval.baselines.uniform import random_choice, uniform_plan
from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.hosts.sta import sigmas_of
from sparse_dit.integrations import workload
from sparse_dit.integrations.diffusers import attachment_of
from sparse_dit.plan import PlanError
from sparse_dit.plan.evidence import prompt_dependent
from sparse_dit.search import engine, plan_of, pricing, profiling, search, search_plan
from sparse_dit.search.cost import CostTable
from sparse_dit.search.profile_file import FORMAT, read_profile
from sparse_dit.search.profiling import profile_pipeline
from sparse_dit.search.seen import density
from tests.helpers import tiny_pipelines
from tests.helpers.search_cases import accounts, stub_costs

SETTINGS = GenerationSettings(64, 64, 17, steps=4, guidance=3.0, max_sequence_length=16)
SHORT = GenerationSettings(64, 64, 9, steps=4, guidance=3.0, max_sequence_length=16)
PROMPTS = ("a cat plays the piano", "a dog runs along the shore")
HELD_OUT = ("a red circle moves left",)
CASE = Case("a quiet harbour", 3)


@pytest.fixture
def fast(monkeypatch):
    stub_costs(monkeypatch)


@functools.cache
def _wan():
    return tiny_pipelines.wan()[0]


@pytest.fixture
def pipe():
    """A tiny Wan that must come out of the test as it went in: bit for bit, and with nothing attached."""
    pipe = _wan()
    before, _ = workload(pipe, SETTINGS).run(CASE)
    threads, processors = torch.get_num_threads(), pipe.transformer.attn_processors
    yield pipe
    assert torch.get_num_threads() == threads
    assert attachment_of(pipe.transformer) is None
    now = pipe.transformer.attn_processors
    assert all(now[name] is processor for name, processor in processors.items())
    after, _ = workload(pipe, SETTINGS).run(CASE)
    assert np.array_equal(before, after)


def _search(pipe, **options):
    return search_plan(
        pipe, PROMPTS, **{"held_out": HELD_OUT, "settings": SETTINGS, "rows": 16, **options}
    )


def _works(pipe, plan, settings, folder):
    """Saved, loaded, patched and generated with; why heads ran dense (None: they ran sparse)."""
    ran = accounts(pipe, plan, CASE, settings, folder)
    return {entry.dense_because for account in ran.values() for entry in account}


@pytest.mark.parametrize(
    "dial", [{"target_speedup": 1.02}, {"max_error": 0.4}, {"min_psnr": 40.0}], ids=str
)
def test_each_dial_gives_a_plan_that_works(pipe, fast, dial, tmp_path):
    said = []
    searched = _search(pipe, report=said.append, **dial)
    plan = searched.plan
    assert None in _works(pipe, plan, SETTINGS, tmp_path)
    if "target_speedup" in dial:
        assert plan.forecast["speedup"] >= 1.02
    if "max_error" in dial:
        assert 0 < plan.forecast["error"] <= 0.4
    if "min_psnr" in dial:
        assert plan.measured["psnr_db"] >= 40 and plan.measured["met"]
    assert 0 < plan.density < 1
    record = plan.provenance
    assert record["objective"] == dial
    assert [c["prompt"] for c in record["cases"]["calibration"]] == list(PROMPTS)
    assert [c["prompt"] for c in record["cases"]["held_out"]] == list(HELD_OUT)
    assert record["settings"] == SETTINGS.to_dict() and record["profile_rows"] == 16
    assert sum(record["stage_shares"]["transformer"]) == pytest.approx(1)
    backing = record["evidence"]
    assert 0 < backing["row_error"] < 1 and 0 <= backing["gap"] < 0.2
    assert backing["repeated"]["same"] == 1.0  # with stubbed costs, which have no spread
    component = plan.components["transformer"]
    for name, layer, stage, head in prompt_dependent(plan):
        assert name == "transformer"
        assert not component.layers[layer][stage][head].pattern.is_dense
    assert "evidence" not in plan_of(searched, searched.choice).provenance
    assert set(record["versions"]) == {"torch", "diffusers", "transformers"}
    assert len(record["schedule"]["sigmas"]) == SETTINGS.steps
    assert sigmas_of(plan, SETTINGS.steps, None) == record["schedule"]["sigmas"], "for other hosts"
    assert plan.measured["held_out_cases"] == 1 and math.isfinite(plan.measured["psnr_db"])
    assert said and all("\n" not in text for text in said)


@pytest.mark.parametrize("family", ["cogvideox", "hunyuan_video", "flux"])
def test_joint_attention_and_images(fast, family, tmp_path):
    pipe, call = tiny_pipelines.BUILDERS[family]()
    sizes = {name: call[name] for name in ("height", "width", "num_frames") if name in call}
    settings = GenerationSettings(**sizes, steps=4, guidance=3.0)
    plan = search(pipe, PROMPTS, held_out=HELD_OUT, settings=settings, rows=8, max_error=0.3)
    component = plan.components["transformer"]
    assert component.layout.num_global and 0 < plan.density < 1
    _works(pipe, plan, settings, tmp_path)


def test_other_choices_of_the_same_search_are_plans_too(pipe, fast, tmp_path):
    searched = _search(pipe, max_error=0.4)
    target = searched.plan.density
    chance = plan_of(searched, random_choice(searched.problem, target))
    assert chance.measured == {} and chance.density == pytest.approx(target, abs=0.02)
    again = plan_of(searched, searched.choice)
    assert again.components == searched.plan.components
    uniform = uniform_plan(searched.plan, searched.profile, by_stage=True)
    ((_, part),) = uniform.components.items()
    used = {density(h.pattern, part.layout) for rows in part.layers["blocks.0.attn1"] for h in rows}
    assert min(used) - 1e-6 <= uniform.density <= max(used)  # what it is, not what was aimed at
    for number, plan in enumerate((chance, uniform)):
        folder = tmp_path / str(number)
        folder.mkdir()
        _works(pipe, plan, SETTINGS, folder)


def test_an_interrupted_search_goes_on_from_its_profile(pipe, fast, tmp_path):
    whole = _search(pipe, max_error=0.4, profile=tmp_path / "whole.safetensors")
    path = tmp_path / "kept.safetensors"

    def stop(text):
        if text.startswith("profile 1/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _search(pipe, max_error=0.4, profile=path, report=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, "whole.safetensors"]
    assert len(read_profile(path).done) == 1
    said = []
    resumed = _search(pipe, max_error=0.4, profile=path, report=said.append)
    assert not [text for text in said if text.startswith("profile 0/")]
    assert [text for text in said if text.startswith("profile 1/")]
    assert resumed.plan.components == whole.plan.components
    assert resumed.problem.error.equal(whole.problem.error)
    said.clear()
    _search(pipe, max_error=0.2, profile=path, report=said.append)  # another dial, nothing profiled
    assert [text for text in said if text.startswith("profile ")] == ["profile 3/3 profiled"]


def test_an_interruption_inside_a_generation_leaves_no_file(pipe, fast, tmp_path, monkeypatch):
    path = tmp_path / "kept.safetensors"
    from sparse_dit.search import recorder

    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(*args)

    real = recorder.sample_rows
    monkeypatch.setattr(recorder, "sample_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _search(pipe, max_error=0.4, profile=path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_profile(pipe, fast, tmp_path, monkeypatch):
    from sparse_dit import whole_file
    from sparse_dit.search import profile_file

    path = tmp_path / "kept.safetensors"
    profile_pipeline(pipe, [CASE], SETTINGS, rows=4, path=path)
    before, profile = path.read_bytes(), read_profile(path)

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(whole_file.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        profile_file.write_profile(profile, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_profile_of_something_else_is_refused(pipe, fast, tmp_path):
    path = tmp_path / "kept.safetensors"
    profile_pipeline(pipe, [CASE], SETTINGS, rows=4, path=path)
    other = tiny_pipelines.wan(num_layers=1)[0]
    cases = [
        (other, [CASE], SETTINGS, 4, "model"),
        (pipe, [CASE], SHORT, 4, "size"),
        (pipe, [CASE], SETTINGS, 5, "number of rows"),
        (pipe, [Case("a dog")], SETTINGS, 4, "list of prompts"),
        (pipe, [CASE, Case("a dog")], SETTINGS, 4, "list of prompts"),
    ]
    before = path.read_bytes()
    for host, prompts, settings, rows, what in cases:
        with pytest.raises(ValueError, match=f"profile of another .*{what}.*name another file"):
            profile_pipeline(host, prompts, settings, rows=rows, path=path)
    assert path.read_bytes() == before


def test_a_profile_round_trips(pipe, tmp_path):
    path = tmp_path / "kept.safetensors"
    made = profile_pipeline(pipe, [CASE], SETTINGS, rows=8, path=path).components["transformer"]
    read = read_profile(path).components["transformer"]
    assert (read.layout, read.sigmas, read.layers) == (made.layout, made.sigmas, made.layers)
    for key, scores in made.scores.items():
        assert all(read.scores[key][name].equal(value) for name, value in scores.items())
        assert [*map(list, read.candidates(*key))] == [*map(list, made.candidates(*key))]
        assert read.standard_error(*key).isfinite().all()
    assert all(read.pictures[key].equal(value) for key, value in made.pictures.items())


def test_a_search_outlives_the_place_of_its_profile(pipe, tmp_path, monkeypatch):
    path, said = tmp_path / "profile.safetensors", []

    def full(profile, place):
        raise OSError(28, "No space left on device", str(place))

    monkeypatch.setattr(profiling, "write_profile", full)
    found = profile_pipeline(
        pipe, [Case("a"), Case("b")], SHORT, rows=4, path=path, say=said.append
    )
    assert len(found.done) >= 2
    words = "the profile can't be kept (No space left on device): the search can't be resumed"
    assert said == [words]
    with pytest.raises(OSError, match="profile: /proc/x can't be written"):
        profile_pipeline(pipe, [Case("a")], SHORT, path="/proc/x")


def test_a_damaged_profile_is_one_clear_line(pipe, tmp_path):
    path, bad = tmp_path / "kept.safetensors", tmp_path / "bad.safetensors"
    profile_pipeline(pipe, [CASE], SETTINGS, rows=4, path=path)
    data = path.read_bytes()
    broken = {
        "empty": b"",
        "truncated": data[: len(data) // 2],
        "text": b"{}",
        "other version": data.replace(FORMAT.encode(), b"sparse_dit profile 9"),
        "no components": data.replace(b'\\"components\\"', b'\\"companents\\"'),
        "a wrong key": data.replace(b'\\"heads\\"', b'\\"headz\\"'),
        "a missing layer": data.replace(b"blocks.0.attn1|norm", b"blocks.7.attn1|norm"),
        "a wrong level": data.replace(b"scores|transformer|0|", b"scores|transformer|x|"),
    }
    for what, content in broken.items():
        assert content != data, what
        bad.write_bytes(content)
        with pytest.raises(PlanError, match=r"bad\.safetensors") as error:
            read_profile(bad)
        assert "\n" not in str(error.value), what
    with pytest.raises(PlanError, match="no such profile"):
        read_profile(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"prompts": []}, ValueError, "at least one prompt"),
        ({"prompts": "a cat"}, TypeError, "list of texts"),
        ({"prompts": None}, TypeError, "list of texts"),
        ({"prompts": ["a cat", " "]}, ValueError, "not empty"),
        ({"prompts": ["a cat"], "held_out": None}, ValueError, "held_out"),
        ({"held_out": []}, ValueError, "held_out must hold"),
        ({"held_out": "a cat"}, TypeError, "held_out must be a list"),
        ({"held_out": [PROMPTS[0]]}, ValueError, "must not be calibration"),
        ({"rows": 0}, ValueError, "rows must be"),
        ({"rows": True}, ValueError, "rows must be"),
        ({"profile_steps": 0}, ValueError, "steps must be"),
        ({"max_generations": float("nan")}, ValueError, "max_generations"),
        ({"max_generations": -1}, ValueError, "max_generations"),
        ({"max_error": None}, ValueError, "give one of"),
        ({"min_psnr": 30.0}, ValueError, "give one of"),
        ({"max_error": 0}, ValueError, "finite number above 0"),
        ({"max_error": -0.1}, ValueError, "finite number above 0"),
        ({"max_error": float("nan")}, ValueError, "finite number above 0"),
        ({"max_error": True}, ValueError, "finite number above 0"),
        ({"max_error": None, "min_psnr": float("inf")}, ValueError, "finite number above 0"),
        ({"max_error": None, "target_speedup": 1}, ValueError, "finite number above 1"),
        ({"pipe": "a folder"}, TypeError, "no pipeline"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_runs(options, error, text):
    options = {
        "pipe": _wan(),
        "prompts": PROMPTS,
        "held_out": HELD_OUT,
        "max_error": 0.1,
        **options,
    }
    reported = []

    def report(line):
        reported.append(line)

    with pytest.raises(error, match=text) as raised:
        search_plan(
            options.pop("pipe"), options.pop("prompts"), settings=SETTINGS, report=report, **options
        )
    assert "\n" not in str(raised.value) and len(reported) <= 1


def test_a_bare_transformer_is_refused():
    with pytest.raises(TypeError, match="takes the pipeline"):
        _search(_wan().transformer, max_error=0.1)


def test_a_patched_pipeline_is_refused_and_stays_patched(pipe, fast):
    plan = _search(pipe, max_error=0.4).plan
    with sparse_dit.patch(pipe, plan):
        attachment = attachment_of(pipe.transformer)
        with pytest.raises(ValueError, match=r"is patched; call handle\.remove"):
            _search(pipe, max_error=0.4)
        assert attachment_of(pipe.transformer) is attachment is not None


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_weights_with_nan_give_an_error_and_no_plan(fast, part):
    pipe, _ = tiny_pipelines.wan()
    with torch.no_grad():
        next(getattr(pipe, part).parameters()).fill_(float("nan"))
    if part == "vae":  # its decoder is what a generation uses
        with torch.no_grad():
            for weight in pipe.vae.decoder.parameters():
                weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or Inf"):
        _search(pipe, max_error=0.4)
    assert attachment_of(pipe.transformer) is None


@pytest.mark.parametrize("phase", ["profile_pipeline", "sensitivity", "dense_reference", "tune"])
def test_a_failure_in_any_phase_leaves_the_pipeline_as_it_was(pipe, fast, monkeypatch, phase):
    from sparse_dit.search import sampling, sensitivity, tune

    def fail(*args, **kwargs):
        raise RuntimeError("broken on purpose")

    place, name = {
        "profile_pipeline": (sampling, "sampled_rows"),
        "sensitivity": (sensitivity, "attention_over"),
        "dense_reference": (engine, "dense_reference"),
        "tune": (tune, "verify"),
    }[phase]
    monkeypatch.setattr(place, name, fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        _search(pipe, max_error=0.4)


def test_out_of_reach_and_declined(pipe, fast, monkeypatch):
    with pytest.raises(ValueError, match=r"target_speedup 1000 is out of reach.*fastest plan"):
        _search(pipe, target_speedup=1000)

    def slow(layout, *args, **kwargs):
        points = ((0.01, 2.0), (1.0, 3.0))
        return CostTable(layout, 1.0, {False: points, True: points}, "auto", 1, "cpu", "float32")

    monkeypatch.setattr(pricing, "measure_cost", slow)
    said = []
    plan = _search(pipe, min_psnr=20.0, report=said.append).plan
    assert plan.density == 1 and plan.forecast["speedup"] == 1 and plan.measured["met"]
    assert any("faster than dense: the plan is all dense" in text for text in said)


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel, self.what = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.numel() > self.numel:
                self.numel, self.what = tensor.numel(), f"{func} {tuple(tensor.shape)}"
        return out


@pytest.mark.parametrize("phase", ["find", "score"])
def test_no_tensor_is_of_tokens_by_tokens(phase):
    from sparse_dit.call import AttentionCall, StepContext
    from sparse_dit.layout import TokenLayout
    from sparse_dit.search.profile import ComponentProfile
    from sparse_dit.search.recorder import Recorder

    layout = TokenLayout.video(16, 16, 16, text_after=16)
    tokens = layout.seq_len
    profile = ComponentProfile("Model", "0" * 64, {"layer": (2, 8)})
    q, k, v = (torch.randn(1, tokens, 2, 8) for _ in range(3))
    context = StepContext(layout, 1.0)
    call = AttentionCall("layer", q, k, v, None, None, None, context, None, lambda: q)
    recorder = Recorder(profile, "find", 8, 0)
    recorder(call)
    recorder.keep()
    with _Largest() as largest:
        Recorder(profile, phase, 8, 0)(call)
    assert largest.numel <= tokens * 8 * 8 < tokens * tokens / 32, largest.what
