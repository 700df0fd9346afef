"""The front of a search: other points without a new search, and files that lie."""

import base64
import dataclasses
import json
import lzma
import re

import pytest

from sparse_dit import cli
from sparse_dit.demo.run import CALIBRATION, QUICK
from sparse_dit.eval.front import figure_of
from sparse_dit.plan import Plan, PlanError
from sparse_dit.search import front as fronts
from sparse_dit.search import search_plan
from sparse_dit.search.front import (
    _packed,
    front_of,
    front_path,
    parse_pick,
    pick,
    read_front,
    thinned,
    write_front,
)
from sparse_dit.search.solve import at_price

SAID: list[str] = []  # what the one search of this file reported


@pytest.fixture(scope="module")
def searched(short_pipe):
    SAID.clear()
    options = {"settings": QUICK, "max_error": 0.3, "tune_on": "calibration", "rows": 16}
    return search_plan(short_pipe, CALIBRATION, report=SAID.append, **options)


def test_a_search_says_how_far_its_sensitivity_phase_is(searched):
    lines = [line for line in SAID if line.startswith("sensitivity of ")]
    form = re.compile(r"sensitivity of transformer (\d+) of (\d+), about \d+ s left")
    counts = [tuple(map(int, form.fullmatch(line).groups())) for line in lines]
    layers, stages = 2, len(searched.plan.components["transformer"].stages)
    total = 2 + stages + layers
    assert counts == [(n, total) for n in range(1, total + 1)]
    assert lines[-1].endswith("about 0 s left")


@pytest.fixture
def plan_file(searched, tmp_path):
    searched.plan.save(tmp_path / "plan.json")
    write_front(searched.front, front_path(tmp_path / "plan.json"))
    return tmp_path / "plan.json"


def test_the_file_gives_back_the_front(searched, plan_file):
    assert read_front(front_path(plan_file)) == searched.front
    points = searched.front.points
    assert [p.speedup for p in points] == sorted(p.speedup for p in points)
    assert points[0].density == 1 and points[-1].density < 0.1
    assert searched.choice.speedup == pytest.approx(
        min((p.speedup for p in points), key=lambda s: abs(s - searched.choice.speedup)), abs=1e-4
    )


def test_no_point_is_worse_than_the_problems_own_at_that_speed(searched):
    points = searched.front.points
    for step in range(-20, 80, 5):
        choice = at_price(searched.problem, 10 ** (step / 10))
        near = [p for p in points if abs(p.speedup - choice.speedup) <= 0.05]
        assert min(p.error for p in near) <= choice.error + 1e-6


@pytest.mark.parametrize(("measure", "value"), [("speedup", 1.1), ("density", 0.4), ("error", 0.2)])
def test_a_pick_is_a_plan_that_keeps_its_promise(searched, plan_file, measure, value):
    front = read_front(front_path(plan_file))
    plan = pick(Plan.load(plan_file), front, measure, value)
    got = {**plan.forecast, "density": plan.density}[measure]
    assert got >= value if measure == "speedup" else got <= value
    assert plan.measured == {} and plan.provenance["objective"] == {measure: value}
    again = Plan.from_dict(*plan.to_dict()) if isinstance(plan.to_dict(), tuple) else plan
    assert again.components.keys() == searched.plan.components.keys()


def test_picking_the_plans_own_point_gives_its_patterns(searched, plan_file):
    own = searched.choice.error
    plan = pick(searched.plan, read_front(front_path(plan_file)), "error", round(own, 6) + 1e-6)
    if plan.forecast["speedup"] == searched.plan.forecast["speedup"]:
        for layer, stages in searched.plan.components["transformer"].layers.items():
            mine = plan.components["transformer"].layers[layer]
            assert [[h.pattern for h in s] for s in mine] == [
                [h.pattern for h in s] for s in stages
            ]
    else:
        assert plan.forecast["speedup"] > searched.plan.forecast["speedup"]


def test_what_no_point_has_is_said(searched, plan_file):
    front = read_front(front_path(plan_file))
    with pytest.raises(ValueError, match=r"no point with speedup 99: the front goes from 1 to"):
        pick(searched.plan, front, "speedup", 99.0)
    for text in ("fast=2", "speedup=", "speedup=nan", "speedup=-1", "2.0"):
        with pytest.raises(ValueError, match="a pick must be one of"):
            parse_pick(text)


def test_psnr_is_forecast_from_what_was_measured(searched):
    assert searched.choice.loss > 0
    front = front_of(searched.problem, "0" * 64, searched.choice, psnr_db=30.0)
    own = [p for p in front.points if p.error == round(searched.choice.error, 6)]
    assert own[0].psnr == pytest.approx(30.0, abs=0.05) and front.points[0].psnr == 100
    by_error = sorted(front.points, key=lambda p: p.error)
    assert [p.psnr for p in by_error] == sorted((p.psnr for p in by_error), reverse=True)
    front = dataclasses.replace(
        front, config_hash=searched.plan.components["transformer"].config_hash
    )
    faster, better = (pick(searched.plan, front, "psnr", db).forecast for db in (25.0, 35.0))
    assert faster["psnr_db"] >= 25 and better["psnr_db"] >= 35
    assert faster["speedup"] > better["speedup"]
    with pytest.raises(ValueError, match="must hold a forecast of the psnr"):
        unknown = tuple(p.model_copy(update={"psnr": None}) for p in front.points)
        pick(searched.plan, dataclasses.replace(front, points=unknown), "psnr", 30.0)


def _spoil(data, change):
    if change == "other model":
        data["config_hash"] = "0" * 64
    elif change == "pattern":
        data["points"][0]["patterns"][0] = 10**6
    elif change == "units":
        data["points"][1]["patterns"] = data["points"][1]["patterns"][1:]
    elif change == "infinite":
        data["points"][0]["speedup"] = 1e999
    elif change == "extra":
        data["run"] = "rm"
    elif change == "hostile pattern":
        data["patterns"] = _packed([{"name": "import os"}])
    elif change == "hostile pattern of version 1":
        data |= {"format": "sparse_dit front 1", "patterns": [{"name": "import os"}]}
    elif change == "no list":
        data["patterns"] = _packed({"name": "dense"})
    elif change == "cut patterns":
        data["patterns"] = data["patterns"][: len(data["patterns"]) // 8 * 4]
    elif change == "no base64":
        data["patterns"] = "~" + data["patterns"]
    elif change == "not compressed":
        data["patterns"] = base64.b64encode(b"[]").decode()
    elif change == "no points":
        data["points"] = []
    return data


@pytest.mark.parametrize(
    "change",
    [
        "pattern",
        "units",
        "infinite",
        "extra",
        "hostile pattern",
        "hostile pattern of version 1",
        "no list",
        "cut patterns",
        "no base64",
        "not compressed",
        "no points",
        "not json",
        "missing",
    ],
)
def test_damaged_files_are_named_in_one_line(plan_file, change):
    path = front_path(plan_file)
    if change == "missing":
        path.unlink()
    elif change == "not json":
        path.write_text("[" * 100_000)
    else:
        path.write_text(json.dumps(_spoil(json.loads(path.read_text()), change)))
    with pytest.raises(PlanError, match=r"search again|a search writes it") as caught:
        read_front(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_patterns_that_grow_beyond_all_bounds_are_refused(plan_file, monkeypatch):
    path = front_path(plan_file)
    monkeypatch.setattr(fronts, "MOST_BYTES", 1 << 20)
    bomb = base64.b64encode(lzma.compress(bytes(8 << 20), preset=0)).decode()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"patterns": bomb}))
    with pytest.raises(PlanError, match=r"damaged \(.*search again"):
        read_front(path)


def test_a_file_of_version_1_gives_the_same_front(searched, plan_file):
    path = front_path(plan_file)
    listed = [pattern.to_dict() for pattern in searched.front.patterns]
    old = {"format": "sparse_dit front 1", "patterns": listed}
    path.write_text(json.dumps(json.loads(path.read_text()) | old))
    assert read_front(path) == searched.front


def test_a_thinned_front_keeps_the_nearest_points_and_their_patterns(searched):
    front = searched.front
    places = (0, 2, len(front.points) - 1)
    kept = [front.points[place] for place in places]
    small = thinned(front, [point.speedup for point in (kept[2], kept[0], kept[1])])
    assert [point.speedup for point in small.points] == [point.speedup for point in kept]
    assert len(small.patterns) < len(front.patterns)
    for point, whole in zip(small.points, kept, strict=True):
        same = [small.patterns[number] for number in point.patterns]
        assert same == [front.patterns[number] for number in whole.patterns]
        assert point.errors == whole.errors


def test_another_models_front_is_refused(searched, plan_file):
    path = front_path(plan_file)
    path.write_text(json.dumps(_spoil(json.loads(path.read_text()), "other model")))
    with pytest.raises(ValueError, match="another model or plan"):
        pick(searched.plan, read_front(path), "density", 0.5)


def test_the_picture_of_a_front_shows_psnr_where_it_is_known(searched):
    front = front_of(searched.problem, "0" * 64, searched.choice, psnr_db=30.0)
    plan = dataclasses.replace(searched.plan, measured={"psnr_db": 30.0})
    _, right = figure_of(front, plan).axes
    known = [(p.speedup, p.psnr) for p in front.points if p.psnr is not None and p.psnr < 100]
    assert [tuple(point) for point in right.lines[0].get_xydata()] == known
    assert right.collections[0].get_offsets().tolist() == [[plan.forecast["speedup"], 30.0]]
    assert "PSNR" in right.get_ylabel()
    words = [text.get_text() for text in right.get_legend().get_texts()]
    assert words[:2] == ["error of heads", "density"] and words[-1] == "PSNR, measured"
    unknown = tuple(p.model_copy(update={"psnr": None}) for p in front.points)
    plan = dataclasses.replace(plan, measured={})
    assert len(figure_of(dataclasses.replace(front, points=unknown), plan).axes) == 1


def test_a_picture_alone_is_written(plan_file, capsys):
    picture = plan_file.with_name("front.svg")
    assert cli.run(["show", str(plan_file), "--picture", str(picture)]) == 0
    assert "PSNR" in picture.read_text() and "wrote" in capsys.readouterr().out
    assert cli.run(["show", str(plan_file), "--picture", "front.xyz"]) == 2
    assert "must name a file that ends in" in capsys.readouterr().err
    other = str(picture.with_name("other.svg"))
    assert cli.run(["show", "ltx-video-2b-geometry", "--picture", other]) == 2
    assert "a search writes it beside its plan" in capsys.readouterr().err


def test_the_commands(plan_file, capsys):
    picture, other = plan_file.with_name("front.png"), plan_file.with_name("other.json")
    assert cli.run(["show", str(plan_file), "--front", "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "forecast speed-up" in capsys.readouterr().out
    command = ["show", str(plan_file), "--pick", "density=0.3", "--out", str(other)]
    assert cli.run(command) == 0
    assert Plan.load(other).density <= 0.3
    assert cli.run(command) == 2  # the file is there
    assert cli.run(["show", str(plan_file), "--pick", "density=0.3"]) == 2
    assert cli.run(["show", "ltx-video-2b-geometry", "--front"]) == 2
    assert "a search writes it beside its plan" in capsys.readouterr().err
