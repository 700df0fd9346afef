"""Searches that let heads keep one pattern over noise levels: profiles, plans, fronts, commands."""

import functools
from dataclasses import replace

import pytest

from sparse_dit import cli
from sparse_dit.demo.run import atlases
from sparse_dit.eval.front import front_beside
from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.plan import Plan
from sparse_dit.plan.evidence import prompt_dependent
from sparse_dit.search import engine, plan_of, search_plan
from sparse_dit.search.baselines import uniform_plan
from sparse_dit.search.check import check_plan
from sparse_dit.search.front import front_path, pick, read_front, write_front
from sparse_dit.search.profile_file import read_profile, write_profile
from sparse_dit.search.profiling import profile_pipeline
from sparse_dit.search.shares import profile_share
from tests import tiny_pipelines
from tests.search_cases import accounts, stub_costs

SETTINGS = GenerationSettings(64, 64, 17, steps=4, guidance=3.0, max_sequence_length=16)
PROMPTS = ("a cat plays the piano", "a dog runs along the shore")
CASES = tuple(Case(prompt, seed) for seed, prompt in enumerate(PROMPTS))
HELD_OUT = ("a red circle moves left",)
CASE = Case("a quiet harbour", 3)


@functools.cache
def _wan():
    return tiny_pipelines.wan()[0]


def _stub(monkeypatch):
    """Costs that aren't measured, most of them attention's."""
    stub_costs(monkeypatch)
    monkeypatch.setattr(engine, "dense_generation", lambda *measured: 0.04)


@pytest.fixture(autouse=True)
def _costs(monkeypatch):
    _stub(monkeypatch)


def _search(**options):
    defaults = {"held_out": HELD_OUT, "settings": SETTINGS, "rows": 16}
    return search_plan(_wan(), PROMPTS, **{**defaults, **options})


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """File of a profile with candidates that noise levels have in common."""
    path = tmp_path_factory.mktemp("shared") / "profile.safetensors"
    profile_pipeline(_wan(), CASES, SETTINGS, rows=16, shared=True, path=path)
    return path


def _patterns(plan):
    rows = [stages for part in plan.components.values() for stages in part.layers.values()]
    return [head.pattern for stages in rows for heads in stages for head in heads]


def _used(plan):
    return set(_patterns(plan))


@pytest.mark.parametrize(
    "dial", [{"target_speedup": 2.0}, {"max_error": 0.4}, {"min_psnr": 30.0}], ids=str
)
def test_merging_keeps_what_was_asked_for(profile, dial, tmp_path):
    said = []
    plain = _search(profile=profile, merge_stages=0.0, **dial)
    searched = _search(profile=profile, merge_stages=0.5, report=said.append, **dial)
    plan = searched.plan
    assert len(_used(plan)) < len(_used(plain.plan)) and plan.density < 1
    if "target_speedup" in dial:
        assert plan.forecast["speedup"] >= 2
    if "max_error" in dial:
        assert plan.forecast["error"] <= 0.4
    if "min_psnr" in dial:
        assert plan.measured["met"]
    assert plan.provenance["merge_stages"] == 0.5
    assert any(text.startswith(f"{len(_used(plan))} patterns in ") for text in said)
    accounts(_wan(), plan, CASE, SETTINGS, tmp_path)


@pytest.fixture(scope="module")
def one_stage(profile):
    """A search that merges whatever can be."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _stub(monkeypatch)
        return _search(profile=profile, merge_stages=1e9, target_speedup=2.0)


def test_levels_at_which_every_head_goes_on_are_one_stage(one_stage, tmp_path):
    plan, (part,) = one_stage.plan, one_stage.plan.components.values()
    assert len(part.stages) < len(one_stage.problem.stages) == 4
    assert (part.stages[0].sigma_max, part.stages[-1].sigma_min) == (1, 0)
    shares = plan.provenance["stage_shares"]["transformer"]
    assert len(shares) == len(part.stages) and sum(shares) == pytest.approx(1)
    assert all(stage < len(part.stages) for _, _, stage, _ in prompt_dependent(plan))
    checked = check_plan(_wan(), plan, CASES[1], SETTINGS, rows=16)
    assert checked.heads and not checked.unseen
    pages = atlases(one_stage)
    assert len(pages) == len(part.stages)
    cells = [cell for page in pages for cells in page.layers.values() for cell in cells]
    assert all(0 <= cell.recall <= 1 for cell in cells)
    assert any(cell.attention is not None for cell in cells)
    for by_stage in (False, True):
        uniform = uniform_plan(plan, one_stage.profile, by_stage=by_stage)
        assert len(uniform.components["transformer"].stages) == len(part.stages)
    again = plan_of(one_stage, one_stage.choice)
    assert len(again.components["transformer"].stages) == 4
    accounts(_wan(), again, CASE, SETTINGS, tmp_path)


def test_a_front_has_all_levels_and_its_picks_are_merged(one_stage, tmp_path):
    file = tmp_path / "plan.json"
    one_stage.plan.save(file)
    write_front(one_stage.front, front_path(file))
    plan, front = Plan.load(file), read_front(front_path(file))
    assert front == one_stage.front and front_beside(str(file), plan) == front
    other = pick(plan, front, "density", 0.5)
    assert other.density <= 0.5
    (own,) = [point for point in front.points if point.density == plan.density]
    lone = replace(front, points=(own,))
    same = pick(plan, lone, "density", 1.0)
    assert _patterns(same) == _patterns(plan)
    assert same.components["transformer"].stages == plan.components["transformer"].stages
    shares = same.provenance["stage_shares"]["transformer"]
    assert shares == pytest.approx(plan.provenance["stage_shares"]["transformer"])
    old = replace(front, levels={})
    with pytest.raises(ValueError, match="another model or plan"):
        pick(plan, old, "density", 0.5)


def _listed(part, level, layer):
    return [list(candidates) for candidates in part.candidates(level, layer)]


def test_a_profile_knows_whether_levels_share_candidates(profile, tmp_path):
    part = read_profile(profile).components["transformer"]
    assert part.shared
    layer = part.layers[0]
    for first, later in zip(part.candidates(0, layer), part.candidates(3, layer), strict=True):
        common = [a for a, b in zip(first, later, strict=True) if a is b]
        assert len(common) > 21 and all(pattern.far for pattern in common[-21:])
    plain = tmp_path / "plain.safetensors"
    profile_pipeline(_wan(), CASES, SETTINGS, rows=16, path=plain)
    words = r"another choice of shared candidates \(search --merge-stages, profile --shared\)"
    with pytest.raises(ValueError, match=words):
        _search(profile=plain, max_error=0.4, merge_stages=0.1)
    with pytest.raises(ValueError, match=words):
        _search(profile=profile, max_error=0.4)
    other = read_profile(plain).components["transformer"]
    count = len(other.candidates(0, layer)[0])
    for key, scores in part.scores.items():  # what levels don't share is scored as without
        assert scores["error"][:, :count].equal(other.scores[key]["error"])


def test_a_stopped_search_goes_on_with_shared_candidates(profile, tmp_path):
    path = tmp_path / "kept.safetensors"

    def stop(text):
        if text.startswith("profile 2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _search(profile=path, max_error=0.4, merge_stages=0.1, report=stop)
    assert len(read_profile(path).done) == 2
    resumed = _search(profile=path, max_error=0.4, merge_stages=0.1)
    whole = _search(profile=profile, max_error=0.4, merge_stages=0.1)
    assert resumed.problem.error.equal(whole.problem.error)
    assert resumed.plan.components == whole.plan.components


def test_processes_share_candidates_as_one_does(profile, tmp_path):
    path = tmp_path / "several.safetensors"
    share = {"rank": 0, "world": 1, "barrier": lambda: None, "rows": 16, "shared": True}
    profile_share(_wan(), CASES, SETTINGS, path, **share)
    one, several = (read_profile(p).components["transformer"] for p in (profile, path))
    assert several.shared
    for key in one.scores:
        assert _listed(one, *key) == _listed(several, *key)


def test_forgotten_levels_still_tell_what_is_shared(profile, tmp_path):
    whole = read_profile(profile)
    part = whole.components["transformer"]
    before = {layer: _listed(part, 0, layer) for layer in part.layers}
    for layer in part.layers:
        del part.scores[2, layer]
        part.looks.pop(("later", 2, layer))
    part.drop_unscored()
    write_profile(whole, tmp_path / "fewer.safetensors")
    read = read_profile(tmp_path / "fewer.safetensors").components["transformer"]
    assert len(read.sigmas) == 3
    for layer, heads in before.items():
        assert _listed(part, 0, layer) == heads == _listed(read, 0, layer)
    del part.forgotten[part.layers[0]]
    write_profile(whole, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="forgotten noise levels are missing"):
        read_profile(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("loss", [-0.1, float("nan"), float("inf")])
def test_a_loss_out_of_range_is_refused_before_anything_runs(loss):
    said = []
    with pytest.raises(ValueError, match="merge_stages must be a finite number >= 0, got"):
        _search(max_error=0.4, merge_stages=loss, report=said.append)
    assert not said


def test_the_commands(tmp_path, capsys):
    """A profile of the one is what the other goes on from; and its plan is shown, picked from, checked."""
    tiny_pipelines.wan()[0].save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    size = "--height 64 --width 64 --num-frames 9 --steps 4 --guidance 1 --max-sequence-length 16"
    asked = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], *size.split()]
    kept, plan = tmp_path / "profile.safetensors", tmp_path / "plan.json"
    assert cli.run(["profile", model, "--out", str(kept), "--shared", *asked]) == 0
    dial = ["--held-out", HELD_OUT[0], "--target-speedup", "1.4", "--profile", str(kept)]
    search = ["search", model, "--out", str(plan), *asked, *dial]
    assert cli.run(search) == 2
    assert "another choice of shared candidates" in capsys.readouterr().err
    assert cli.run([*search, "--merge-stages", "-1"]) == 2
    capsys.readouterr()
    assert cli.run([*search, "--merge-stages", "1e6"]) in (0, 1)  # 1: no speed-up is measured
    said = capsys.readouterr().err
    assert "profile 3/3 profiled" in said and " patterns in " in said
    merged = Plan.load(plan)
    assert len(merged.components["transformer"].stages) < 4
    other = tmp_path / "other.json"
    assert cli.run(["show", str(plan), "--heads"]) == 0
    assert cli.run(["show", str(plan), "--pick", "density=0.3", "--out", str(other)]) == 0
    assert Plan.load(other).density <= 0.3
    assert cli.run(["check", model, str(plan)]) in (0, 1)
    report = ["--out", str(tmp_path / "report"), "--prompt", "a boat", *size.split()]
    assert cli.run(["eval", model, str(plan), *report]) == 0, capsys.readouterr().err
    assert cli.run(["diff", str(plan), str(other)]) == 1
