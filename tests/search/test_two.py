"""Searching a pipeline with two transformers, as Wan 2.2: one budget, a plan that names both."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from sparse_dit import cli
from sparse_dit.eval.baselines.uniform import random_choice, uniform_plan
from sparse_dit.eval.command import plan_atlases
from sparse_dit.eval.front import front_beside
from sparse_dit.eval.frontier import FrontierRequest, frontier
from sparse_dit.eval.heads import head_quality
from sparse_dit.eval.quality import evaluate
from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.integrations import (
    attachment_of,
    components,
    self_attention_layers,
    workload,
)
from sparse_dit.plan import Plan
from sparse_dit.search import plan_of, search_plan, sensitivity
from sparse_dit.search.assemble import one_or_named
from sparse_dit.search.check import check_plan
from sparse_dit.search.front import front_path, pick, read_front, write_front
from sparse_dit.search.profile_file import read_profile
from sparse_dit.search.profiling import profile_pipeline
from sparse_dit.search.provenance import loss_error
from sparse_dit.search.sensitivity import replaying
from sparse_dit.search.shares import profile_share
from sparse_dit.search.solve import at_price, joined, stages_of
from sparse_dit.search.solve import evaluate as evaluated
from tests.helpers import tiny_pipelines
from tests.helpers.prompted import prompted
from tests.helpers.search_cases import accounts, stub_costs
from tests.helpers.solver_cases import random_problem

SETTINGS = GenerationSettings(64, 64, 17, steps=6, guidance=3.0)
PROMPTS = ("a cat plays the piano", "a dog runs along the shore")
HELD_OUT = ("a red circle moves left",)
CASE = Case("a quiet harbour", 3)
BOTH = ["transformer", "transformer_2"]


@pytest.fixture(scope="module")
def pipe():
    """A tiny Wan 2.2: noise levels from .9 up are one transformer's, those below the other's.

    It gives latents as pictures: its random autoencoder jumps where latents hardly differ.
    """
    pipe, call = tiny_pipelines.wan(second=True)
    with torch.no_grad():  # so that the two differ in what they spoil
        for layer in self_attention_layers(pipe.transformer_2).values():
            layer.to_out[0].weight.mul_(0.5)
    return prompted(pipe, call, lambda prompt: {"prompt": prompt})


def _search(pipe, **options):
    defaults = {"held_out": HELD_OUT, "settings": SETTINGS, "rows": 8, "profile_steps": 6}
    return search_plan(pipe, PROMPTS, **{**defaults, **options})


@pytest.fixture(scope="module")
def searched(pipe, tmp_path_factory):
    """A search, and the file of its profile."""
    path = tmp_path_factory.mktemp("two") / "profile.safetensors"
    with pytest.MonkeyPatch.context() as monkeypatch:
        stub_costs(monkeypatch)
        return _search(pipe, max_error=0.3, profile=path), path


def _sparse(part):
    return sum(
        not head.pattern.is_dense for s in part.layers.values() for heads in s for head in heads
    )


def test_both_transformers_are_sparse_in_the_plan_and_run(pipe, searched, tmp_path):
    plan = searched[0].plan
    assert list(plan.components) == BOTH and all(_sparse(p) for p in plan.components.values())
    ran = accounts(pipe, plan, CASE, SETTINGS, tmp_path)
    for name in BOTH:
        sparse = [entry for entry in ran[name] if entry.dense_because is None]
        assert sparse and {entry.layer for entry in ran[name]} == set(plan.components[name].layers)
    assert all(attachment_of(part) is None for part in components(pipe).values())
    computed = sum(entry.computed for account in ran.values() for entry in account)
    pairs = sum(entry.pairs for account in ran.values() for entry in account)
    assert computed / pairs == pytest.approx(plan.density, abs=1e-5)


def test_noise_levels_are_those_that_each_transformer_ran_at(searched):
    parts = searched[0].profile.components
    high, low = (parts[name].sigmas for name in BOTH)
    assert min(high) >= 0.9 > max(low) and len(high) + len(low) == SETTINGS.steps
    (reference,) = searched[0].references
    recorded = searched[0].plan.provenance["schedule"]["sigmas"]
    assert recorded == [round(sigma, 6) for sigma in high + low], "the steps of both"
    for name in BOTH:
        assert list(dict.fromkeys(reference.forwards[name])) == parts[name].sigmas
        part = searched[0].plan.components[name]
        assert part.stages == stages_of(parts[name].sigmas)
        assert (part.stages[0].progress_max, part.stages[-1].progress_min) == (1, 0)


def test_one_problem_holds_both_with_their_own_calls(searched):
    task, plan = searched[0].problem, searched[0].plan
    units = {name: task.units_of(name) for name in BOTH}
    assert sum(map(len, units.values())) == len(task.units)
    assert [task.components[stage] for stage, _, _ in task.units] == [
        name for name in BOTH for _ in units[name]
    ]
    shares = plan.provenance["stage_shares"]
    steps = [len(searched[0].profile.components[name].sigmas) for name in BOTH]
    for name, count in zip(BOTH, steps, strict=True):
        assert shares[name] == pytest.approx([1 / SETTINGS.steps] * count)
        assert task.weight[units[name]].sum() == pytest.approx(count / SETTINGS.steps)
        assert task.stock_seconds[units[name]].sum() == pytest.approx(
            1e-3 * 2 * count * 4
        )  # two forwards a step, two layers of two heads
    record = plan.provenance["sensitivity"]
    assert {name: len(record[name]["stages"]) for name in BOTH} == dict(
        zip(BOTH, steps, strict=True)
    )
    assert plan.cost["dense_seconds"] == 1e-3  # both are alike, so one table is for both
    assert math.isfinite(plan.measured["psnr_db"]) and plan.forecast["speedup"] > 1


def test_the_budget_is_spent_where_it_does_most_good(searched):
    """No other division of the seconds between the two, each at a price of its own, is better."""
    task = searched[0].problem
    high, low = (task.units_of(name) for name in BOTH)
    importance = [task.importance[units].sum().item() for units in (high, low)]
    assert min(importance) > 0 and importance[0] != pytest.approx(importance[1], rel=0.05)
    unit = task.dense_seconds / task.loss.max().item()
    choices = [at_price(task, unit * 10**step) for step in (-4, -3, -2, -1, 0, 1)]
    assert len({round(choice.seconds, 9) for choice in choices}) > 2
    for one, two, shared in itertools.product(choices, repeat=3):
        divided = evaluated(task, torch.cat([one.pick[high], two.pick[low]]))
        slower = divided.seconds > shared.seconds * (1 + 1e-9)
        assert slower or divided.loss >= shared.loss * (1 - 1e-9)


def test_it_goes_on_from_its_profile(pipe, searched, monkeypatch):
    stub_costs(monkeypatch)
    whole, path = searched
    assert list(read_profile(path).components) == BOTH
    said = []
    again = _search(pipe, max_error=0.3, profile=path, report=said.append)
    assert [text for text in said if text.startswith("profile ")] == ["profile 3/3 profiled"]
    assert again.problem.error.equal(whole.problem.error)
    for name in BOTH:
        assert again.plan.components[name].stages == whole.plan.components[name].stages


@pytest.mark.parametrize("dial", [{"target_speedup": 1.01}, {"min_psnr": 45.0}], ids=str)
def test_the_other_dials(pipe, searched, dial, monkeypatch):
    stub_costs(monkeypatch)
    plan = _search(pipe, profile=searched[1], **dial).plan
    assert list(plan.components) == BOTH
    if "min_psnr" in dial:
        assert plan.measured["met"] and plan.measured["psnr_db"] >= 45
    else:
        assert plan.forecast["speedup"] >= 1.01


def test_tuning_on_calibration(pipe, monkeypatch):
    stub_costs(monkeypatch)
    found = _search(pipe, max_error=0.3, tune_on="calibration", held_out=None, profile_steps=4)
    assert all(_sparse(part) for part in found.plan.components.values())
    assert {n: len(s) for n, s in found.references[0].forwards.items()} == {BOTH[0]: 4, BOTH[1]: 8}


def test_measured_costs_and_break_even_of_each(pipe, searched):
    found = _search(pipe, max_error=0.3, profile=searched[1])
    for part in found.plan.components.values():
        low, high = part.valid_tokens
        assert low <= part.layout.seq_len and high is None
        assert (low > 0) == bool(_sparse(part)), "with few tokens a transformer may be faster dense"
    assert found.plan.cost["tokens"] == 80


def test_the_front_and_its_picks(searched, tmp_path, capsys):
    plan, file = searched[0].plan, tmp_path / "plan.json"
    plan.save(file)
    write_front(searched[0].front, front_path(file))
    loaded, front = Plan.load(file), read_front(front_path(file))
    assert front_beside(str(file), loaded) == front
    sparser = pick(loaded, front, "density", plan.density * 0.9)
    assert list(sparser.components) == BOTH and sparser.density <= plan.density * 0.9
    own = next(p for p in front.points if p.density == plan.density)
    same = pick(loaded, front, "density", own.density)
    if same.forecast["error"] == plan.forecast["error"]:
        for name, part in plan.components.items():
            for layer, stages in part.layers.items():
                mine = same.components[name].layers[layer]
                assert [[h.pattern for h in s] for s in mine] == [
                    [h.pattern for h in s] for s in stages
                ]
    one = replace(plan, components={"transformer": plan.components["transformer"]})
    with pytest.raises(ValueError, match="another model or plan"):
        pick(one, front, "density", 0.5)
    other = tmp_path / "other.json"
    assert cli.run(["show", str(file), "--pick", "density=0.5", "--out", str(other)]) == 0
    assert list(Plan.load(other).components) == BOTH
    assert cli.run(["show", str(file), "--front"]) == 0
    assert cli.run(["show", str(file), "--heads"]) == 0
    said = capsys.readouterr().out
    assert "transformer_2" in said


def test_other_choices_and_baselines(pipe, searched, tmp_path):
    whole = searched[0]
    again = plan_of(whole, whole.choice)
    assert again.components == whole.plan.components
    chance = plan_of(whole, random_choice(whole.problem, whole.plan.density))
    uniform = uniform_plan(whole.plan, whole.profile, by_stage=True)
    for number, plan in enumerate((chance, uniform, whole.plan)):
        folder = tmp_path / str(number)
        folder.mkdir()
        ran = accounts(pipe, plan, CASE, SETTINGS, folder)
        entries = [entry for account in ran.values() for entry in account]
        density = sum(e.computed for e in entries) / sum(e.pairs for e in entries)
        assert density == pytest.approx(plan.density, abs=1e-4)


def test_report_and_check_see_both(pipe, searched):
    plan = searched[0].plan
    stock = tiny_pipelines.wan(second=True)[0]  # which reports its steps
    quality = evaluate(
        stock, plan, [CASE], replace(SETTINGS, max_sequence_length=16), noise_cases=0
    )
    assert quality.density == pytest.approx(plan.density, abs=1e-5) and quality.tokens == 80
    heads = head_quality(pipe, plan, CASE, SETTINGS)
    assert list(heads) == BOTH and all(heads.values())
    atlases = plan_atlases(plan, heads)
    assert {atlas.component for atlas in atlases} == set(BOTH)
    checked = check_plan(pipe, plan, Case(PROMPTS[1], 1), SETTINGS, rows=16)
    assert {head.component for head in checked.heads} == set(BOTH) and not checked.unseen


def test_sensitivity_with_playback_is_that_of_whole_runs(pipe, monkeypatch):
    """Up to the probed step both transformers' outputs are played back."""
    parts = {"transformer": stages_of([1.0, 0.93]), "transformer_2": stages_of([0.8, 0.4])}
    played = []

    def watched(transformer, outputs, intercept, pipe):
        played.append(len(outputs))
        return replaying(transformer, outputs, intercept, pipe)

    def whole(transformer, outputs, intercept, pipe):
        return replaying(transformer, [], intercept, pipe)

    for name, stages in parts.items():
        layers = list(self_attention_layers(components(pipe)[name]))
        options = (workload(pipe, SETTINGS), name, stages, layers, CASE)
        monkeypatch.setattr(sensitivity, "replaying", watched)
        ours = sensitivity.sensitivity(*options, levels=4)
        monkeypatch.setattr(sensitivity, "replaying", whole)
        assert sensitivity.sensitivity(*options, levels=4) == ours
        assert all(value > 0 for value in ours.stages)
    assert max(played) == 4  # all that the first one gives


def test_a_transformer_that_never_runs_is_named(pipe):
    with pytest.raises(
        ValueError, match=r"no forward of transformer_2 in 1 steps: profile with mo"
    ):
        _search(pipe, max_error=0.3, profile_steps=1)
    assert all(attachment_of(part) is None for part in components(pipe).values())


def test_a_patched_second_transformer_is_refused(pipe, searched):
    from sparse_dit import patch

    plan = searched[0].plan
    second = replace(plan, components={"transformer_2": plan.components["transformer_2"]})
    with patch(pipe, second), pytest.raises(ValueError, match="is patched; call handle"):
        _search(pipe, max_error=0.3)


def test_prompts_profiled_apart_add_up(pipe, tmp_path):
    """Each run in a file of its own: put together they are what one process finds and scores."""
    whole = tmp_path / "whole.safetensors"
    cases = [Case(prompt, seed) for seed, prompt in enumerate((*PROMPTS, *HELD_OUT, "a boat"))]
    one = profile_pipeline(pipe, cases, SETTINGS, rows=8, path=whole)
    path = tmp_path / "shared.safetensors"
    share = {"rank": 0, "world": 1, "barrier": lambda: None, "rows": 8}
    profile_share(pipe, cases, SETTINGS, path, **share)
    both = read_profile(path)
    assert list(both.components) == BOTH and both.done == one.done
    for name, part in one.components.items():
        other = both.components[name]
        assert (part.sigmas, part.layers) == (other.sigmas, other.layers)
        for key, scores in part.scores.items():
            torch.testing.assert_close(other.scores[key], scores, rtol=1e-4, atol=1e-6)


def test_the_commands(tmp_path, capsys):
    tiny_pipelines.wan(second=True)[0].save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    size = "--height 64 --width 64 --num-frames 9 --steps 4 --guidance 1 --max-sequence-length 16"
    model, plan, prompts = (str(tmp_path / n) for n in ("model", "plan.json", "prompts.txt"))
    made = ["--held-out", HELD_OUT[0], "--max-error", "0.3", "--out", plan]
    assert cli.run(["search", model, "--prompts", prompts, *size.split(), *made]) == 0
    assert list(Plan.load(plan).components) == BOTH
    assert read_front(front_path(tmp_path / "plan.json")).points
    assert cli.run(["show", plan]) == 0
    assert cli.run(["check", model, plan]) in (0, 1)  # heads of random weights vary
    report = ["--out", str(tmp_path / "report"), "--prompt", "a boat", *size.split()]
    assert cli.run(["eval", model, plan, *report]) == 0, capsys.readouterr().err
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {head["component"] for head in data["heads"]} == set(BOTH) and data["front"]
    capsys.readouterr()
    rows = ["--json", str(tmp_path / "s.json"), "--prompt", "a cat", "--held-out", "a boat"]
    assert cli.run(["stability", model, *rows, "--count", "1", *size.split()]) == 2
    assert "compare the plans with `sparse-dit eval`" in " ".join(capsys.readouterr().err.split())


def test_the_error_bar_is_of_both(searched):
    whole = searched[0]
    parts, task, pick = whole.profile.components, whole.problem, whole.choice.pick
    alone = []
    for name in BOTH:
        only = torch.zeros_like(pick).index_copy(0, task.units_of(name), pick[task.units_of(name)])
        alone.append(loss_error(parts, task, only))
    assert min(alone) > 0
    assert loss_error(parts, task, pick) == pytest.approx(math.hypot(*alone))


def test_what_is_for_one_transformer_says_so(pipe, tmp_path):
    request = FrontierRequest(
        [CASE], [Case("a boat")], SETTINGS, (0.5,), ("searched",), tmp_path / "f.json"
    )
    with pytest.raises(NotImplementedError, match="scored for one transformer, got transformer an"):
        frontier(pipe, request, print)


def test_a_lone_problem_is_joined_as_it_is():
    task = random_problem(3, 2, 2, 5)
    alone = joined({"transformer": task}, {"transformer": 1.0}, task.dense_seconds)
    for field in ("importance", "seconds", "stock_seconds", "error", "density", "recall", "weight"):
        assert getattr(alone, field).equal(getattr(task, field))
    assert (alone.units, alone.stages) == (task.units, task.stages)
    assert alone.other_seconds == pytest.approx(task.other_seconds, abs=1e-12)


def test_joined_problems_add_up():
    one, two = random_problem(2, 2, 2, 5, seed=1), random_problem(3, 1, 2, 5, seed=2)
    rest = 7.0
    dense = (one.stock_seconds.sum() + two.stock_seconds.sum()).item() + rest
    both = joined({"a": one, "b": two}, {"a": 0.25, "b": 0.75}, dense)
    assert both.stages_of("b") == [2, 3, 4] and both.units_of("a").tolist() == list(range(8))
    assert both.dense_seconds == pytest.approx(dense) and both.other_seconds == pytest.approx(rest)
    assert int(both.layer_of.max()) + 1 == 2 * 2 + 3
    picks = [torch.randint(5, (len(task.units),)) for task in (one, two)]
    parts = [evaluated(task, pick) for task, pick in zip((one, two), picks, strict=True)]
    whole = evaluated(both, torch.cat(picks))
    assert whole.loss == pytest.approx(sum(part.loss for part in parts))
    assert whole.density == pytest.approx(0.25 * parts[0].density + 0.75 * parts[1].density)
    seconds = sum(c.seconds - t.other_seconds for c, t in zip(parts, (one, two), strict=True))
    assert whole.seconds == pytest.approx(seconds + rest)


def test_what_is_alike_is_said_once():
    assert one_or_named({"a": 1, "b": 1}) == 1 and one_or_named({"a": 1}) == 1
    assert one_or_named({"a": 1, "b": 2}) == {"a": 1, "b": 2}
