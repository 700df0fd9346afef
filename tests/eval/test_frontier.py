"""Our plans against the published methods: every rule, and the command as a person runs it."""

import json
from dataclasses import replace

import pytest
import torch

from sparse_dit import cli, resources
from sparse_dit.demo.run import CALIBRATION, HELD_OUT
from sparse_dit.demo.run import QUICK as DEMO
from sparse_dit.eval import frontier as frontier_module
from sparse_dit.eval.baselines import (
    METHODS,
    SOURCES,
    least_loss_at_density,
    plan_at,
    score_baselines,
)
from sparse_dit.eval.baselines import online as online_module
from sparse_dit.eval.baselines.families import families
from sparse_dit.eval.baselines.rule import Rule
from sparse_dit.eval.frontier import TRANSFERRED, FrontierRequest, frontier
from sparse_dit.layout import TokenLayout
from sparse_dit.search import search_plan
from sparse_dit.search.seen import density
from sparse_dit.search.solve import evaluate
from tests.helpers.search_cases import stub_costs

QUICK = replace(DEMO, steps=3)


@pytest.fixture(scope="module", autouse=True)
def costs():
    """Prices that aren't measured: what is compared here is quality."""
    with pytest.MonkeyPatch.context() as patched:
        stub_costs(patched)
        yield


@pytest.fixture(scope="module")
def searched(short_pipe):
    return search_plan(
        short_pipe, CALIBRATION, settings=QUICK, max_error=0.5, tune_on="calibration", rows=16
    )


@pytest.fixture(scope="module")
def scores(short_pipe, searched):
    ((component, part),) = searched.profile.components.items()
    return score_baselines(short_pipe, component, part, CALIBRATION[-1], QUICK, rows=8)


@pytest.fixture
def known(monkeypatch, searched, scores):
    """One search for each size and one scoring serve all tests of what is done with them."""
    made = {QUICK: searched}

    def search(short_pipe, cases, *, settings, **options):
        if settings not in made:
            made[settings] = search_plan(
                short_pipe, cases, settings=settings, rows=8, max_error=0.5
            )
        return made[settings]

    monkeypatch.setattr(frontier_module, "search_plan", search)
    monkeypatch.setattr(frontier_module, "score_baselines", lambda *args: scores)


@pytest.mark.parametrize("grid", [(8, 12, 12), (21, 30, 52), (1, 16, 16)], ids=str)
def test_every_family_has_patterns_on_every_side_of_a_quarter(grid):
    layout = TokenLayout.video(*grid)
    for name, patterns in families(layout).items():
        assert len(set(patterns)) == len(patterns)
        assert not any(p.far for p in patterns), "published methods have no far field"
        if name != "skip" and grid[0] > 1 and layout.seq_len < 5000:
            found = [density(p, layout) for p in patterns]
            least = 0.6 if name == "radial" else 0.25  # a frame sees itself whole: an eighth here
            assert min(found) < least < max(found), name


@pytest.mark.parametrize("target", [0.15, 0.4])
@pytest.mark.parametrize("method", METHODS)
def test_plans_stay_below_the_density(searched, scores, method, target):
    plan = plan_at(method, searched, scores, target)
    if plan is None:
        least = {"radial": 0.6, "two classes": 0.2}  # at this size tiles are large
        assert target < least[method]
        return
    assert plan.density <= target + 0.0051
    part = searched.profile.components["transformer"]
    total, shares = 0.0, searched.plan.provenance["stage_shares"]["transformer"]
    for stages in plan.components["transformer"].layers.values():
        for share, heads in zip(shares, stages, strict=True):
            mean = sum(density(h.pattern, part.known_layout) for h in heads) / len(heads)
            total += share * mean / len(part.layers)
    assert plan.density == pytest.approx(total, abs=1e-4)


def test_ours_forecasts_less_loss_than_any_choice_by_lot(searched, scores):
    from sparse_dit.eval.baselines.uniform import random_choice

    ours = least_loss_at_density(searched, 0.3).forecast["error"]
    for seed in range(5):
        choice = random_choice(searched.problem, 0.3, seed)
        assert ours < choice.error


def test_what_the_hull_leaves_of_a_density_is_spent(searched):
    task, better = searched.problem, []
    work = task.density * task.weight[:, None]
    prices = 10 ** torch.arange(-12, 12, 0.1, dtype=torch.float64)
    hull = [evaluate(task, (work + price * task.loss).argmin(1)) for price in prices]
    for target in (0.15, 0.3, 0.5):
        plan = least_loss_at_density(searched, target)
        least = min(choice.error for choice in hull if choice.density <= target)
        assert plan.density <= target + 1e-6
        assert plan.forecast["error"] <= least + 1e-6
        better.append(plan.forecast["error"] < least * 0.999)
    assert any(better)


def test_two_classes_takes_the_better_band_for_each_head(searched, scores):
    plan = plan_at("two classes", searched, scores, 0.35)
    part = searched.profile.components["transformer"]
    names = {"stripe": "temporal", "window": "spatial", "union": "spatial"}
    seen = set()
    for layer, stages in plan.components["transformer"].layers.items():
        for level, heads in enumerate(stages):
            for head, choice in enumerate(heads):
                if choice.pattern.is_dense:
                    continue
                patterns = scores.patterns[level, layer, head]
                number = patterns.index(choice.pattern)
                seen.add((names[choice.pattern.name], number))
                error = scores.error[level, part.layers.index(layer), head]
                used = {n for _, n in seen}
                assert error[number] <= min(error[n] for n in used) + 1e-12 or len(used) > 2
    assert len(seen) <= 2, "one spatial and one temporal band"


def test_the_rule_takes_the_least_loss_and_dense_above_epsilon():
    error = torch.tensor([[0.5, 0.1, 0.2], [0.9, 0.8, 0.7]])
    dens = torch.tensor([[0.0, 0.3, 0.1], [0.0, 0.3, 0.1]])
    assert Rule((4, 5, 6), 0.0, 0.6)(error, dens).tolist() == [5, -1]
    assert Rule((4, 5, 6), 1.0, 0.8)(error, dens).tolist() == [6, 6]
    assert Rule((4, 5, 6), 9.0, 0.9)(error, dens).tolist() == [4, 4]


def test_the_rivals_errors_are_those_of_whole_attention(searched, scores):
    dense_like = scores.error[..., scores.places["skip"][0]]
    assert torch.allclose(dense_like, torch.ones_like(dense_like), atol=1e-4)  # nothing seen
    assert (scores.error >= 0).all() and (scores.density > 0).any()


def test_rows_are_kept_and_gone_on_with(short_pipe, known, tmp_path):
    file = tmp_path / "rows.json"
    said = []

    def request(methods, held=HELD_OUT[:1]):
        return FrontierRequest(CALIBRATION, held, QUICK, [0.3], methods, file)

    first = frontier(short_pipe, request(["searched"]), said.append)
    assert [row["method"] for row in first] == ["searched"]
    again = frontier(short_pipe, request(["searched", "row-wise blocks"]), said.append)
    assert again[0] == first[0] and again[1]["method"] == "row-wise blocks"
    assert set(first[0]) >= {"tokens", "density", "psnr_db", "ssim", "speedup", "psnr_flat_db"}
    assert again[0]["psnr_db"] > again[1]["psnr_db"] > 0
    assert again[0]["forecast"] > 1 and again[1]["forecast"] is None
    assert frontier(short_pipe, request(["searched"]), said.append) == again  # nothing left to do
    with pytest.raises(ValueError, match="other weights, prompts or settings"):
        frontier(short_pipe, request(["searched"], HELD_OUT), said.append)
    data = json.loads(file.read_text())
    data["conditions"]["model"]["transformer"] = "0" * 64
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="rows of another model"):
        frontier(short_pipe, request(["searched"]), said.append)
    file.write_text("{}")
    with pytest.raises(ValueError, match="no frontier file"):
        frontier(short_pipe, request(["searched"]), said.append)


def test_a_plan_of_another_size_is_measured_unchanged(short_pipe, known, tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    small = replace(QUICK, width=64, height=64)
    densities = [0.35, 0.5]
    request = FrontierRequest(
        CALIBRATION, HELD_OUT[:1], QUICK, densities, ["searched"], file, small
    )
    dense_made, measure = [], frontier_module.evaluate

    def watched(*args, references, **options):
        dense_made.append(references is None)
        return measure(*args, references=references, **options)

    monkeypatch.setattr(frontier_module, "evaluate", watched)
    own, other, *denser = frontier(short_pipe, request, lambda text: None)
    assert dense_made == [True, False, True, False]  # anew at each density
    assert own["dense_seconds"] == other["dense_seconds"]
    assert denser[0]["dense_seconds"] == denser[1]["dense_seconds"]
    assert denser[0]["psnr_db"] > own["psnr_db"]
    assert (own["method"], other["method"]) == ("searched", TRANSFERRED)
    assert "used unchanged" in other["source"] and other["tokens"] == own["tokens"]
    assert other["density"] <= 0.351 and other["psnr_db"] > 0
    with pytest.raises(ValueError, match="other weights, prompts or settings"):
        frontier(short_pipe, replace(request, searched_at=None), lambda text: None)
    with pytest.raises(ValueError, match="must be another one"):
        replace(request, searched_at=QUICK)


def test_the_density_of_a_plan_counts_at_the_size_it_is_used_at(searched):
    layout = TokenLayout.video(8, 16, 16)
    plan = least_loss_at_density(searched, 0.3, layout)
    part = plan.components["transformer"]
    shares = plan.provenance["stage_shares"]["transformer"]
    total = 0.0
    for stages in part.layers.values():
        for share, heads in zip(shares, stages, strict=True):
            total += share * sum(density(h.pattern, layout) for h in heads) / len(heads)
    assert 0.25 < total / len(part.layers) <= 0.301


def test_the_command_prints_and_plots(known, short_model, tmp_path, monkeypatch, capsys):
    """Of its own model, here cut short."""
    monkeypatch.setattr(resources, "shipped", lambda name: short_model)
    size = ["--height", "96", "--width", "96", "--steps", "3", "--held-out", HELD_OUT[0].prompt]
    files = ["--json", f"{tmp_path}/f.json", "--plot", f"{tmp_path}/f.png"]
    some = ["--density", "0.4", "--method", "searched", "--method", "two classes"]
    assert cli.run(["eval", "frontier", *size, *files, *some]) == 0
    said = capsys.readouterr().out
    assert "two classes" in said and "flat image" in said
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [row["source"] for row in rows] == [SOURCES["searched"], SOURCES["two classes"]]
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_rules_without_a_plan_need_no_search(short_pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(frontier_module, "search_plan", None)
    monkeypatch.setattr(online_module, "RUNS", 3)
    small = replace(QUICK, height=64, width=64, steps=4)
    request = FrontierRequest(
        CALIBRATION[:1], HELD_OUT[:1], small, [0.1, 0.9], ["online"], tmp_path / "f.json"
    )
    none, row = frontier(short_pipe, request, lambda line: None)
    assert none["none"], "one step of four is more"
    assert 0.3 < row["density"] <= 0.9
    assert row["source"].startswith("ours") and row["psnr_db"] > row["psnr_flat_db"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"densities": [0.0]}, "between 0 and 1"),
        ({"methods": ["magic"]}, "methods must be among"),
        ({"held_out": ()}, "a held-out prompt, got none"),
        ({"held_out": CALIBRATION}, "must not be calibration"),
    ],
)
def test_wrong_requests_are_refused(tmp_path, change, words):
    good = {
        "calibration": CALIBRATION,
        "held_out": HELD_OUT,
        "settings": QUICK,
        "densities": [0.3],
        "methods": METHODS,
        "file": tmp_path / "f.json",
    }
    with pytest.raises(ValueError, match=words):
        FrontierRequest(**{**good, **change})
