"""What a report says of the plan itself: its search's front, forecasts, other sizes, another plan."""

import html.parser
import json
from dataclasses import replace

import pytest

from sparse_dit import cli
from sparse_dit.eval.differences import difference
from sparse_dit.eval.figures import Point, front_curve, to_svg
from sparse_dit.eval.forecasts import compared, expected_psnr
from sparse_dit.eval.front import front_beside
from sparse_dit.eval.page import render_page
from sparse_dit.eval.report_files import to_json
from sparse_dit.eval.sentences import findings, limits
from sparse_dit.eval.sizes import calibrated_at, evaluate_sizes, other_size, parse_sizes
from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.layout import TokenLayout
from sparse_dit.plan import Plan, PlanError, Stage
from sparse_dit.search.front import front_path, write_front
from tests.helpers.eval_cases import (
    WINDOW,
    coarser,
    made_up_front,
    made_up_plan,
    made_up_quality,
    made_up_report,
    uniform_plan,
)
from tests.helpers.tiny_pipelines import wan


class Sections(html.parser.HTMLParser):
    """What a reader sees of each section, and its tables' rows, by the heading's id."""

    def __init__(self, text):
        super().__init__()
        self.text, self.rows, self._place, self._cell = {}, {}, "head", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "h2":
            self._place = dict(attrs)["id"]
        if tag == "tr":
            self.rows.setdefault(self._place, []).append([])
        if tag in ("td", "th") and self._place in self.rows:
            self.rows[self._place][-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        self.text[self._place] = self.text.get(self._place, "") + data
        if self._cell:
            self.rows[self._place][-1][-1] += data


def shown(**changes):
    report = made_up_report(**changes)
    return Sections(
        render_page(report, findings(report), limits(report), ("a.mp4", "b.mp4", "c.mp4"))
    )


def test_forecasts_stand_beside_what_was_measured():
    plan = replace(made_up_plan(), forecast={"speedup": 1.6, "seconds": 7.5, "dense_seconds": 12.0})
    rows = {row[0]: row[1:] for row in shown(plan=plan).rows["forecasts"]}
    assert rows["speed-up"] == ["1.60x", "1.56x", "-2.3%"]
    assert rows["dense generation"] == ["12.00 s", "12.50 s", "+4.2%"]
    assert rows["sparse generation"] == ["7.50 s", "8.00 s", "+6.7%"]
    assert rows["density"] == ["40.0 %", "31.0 %", "-22.5%"]
    assert rows["PSNR against dense"] == ["31.0 dB", "34.0 dB", "+3.0 dB"]


def test_what_was_not_forecast_is_a_dash():
    quality = made_up_quality(forecast_speedup=None)
    found = compared(made_up_plan(), quality, None)
    assert [entry.forecast for entry in found] == [None, None, None, 0.4, None]
    assert [entry.off for entry in found] == ["-", "-", "-", "-22.5%", "-"]
    rows = shown(quality=quality, expected_psnr_db=None).rows["forecasts"]
    assert rows[1] == ["speed-up", "-", "1.56x", "-"]


def test_the_expected_psnr_is_forecast_before_it_is_verified():
    plan = replace(made_up_plan(), measured={"psnr_db": 33.0})
    assert expected_psnr(plan) == 33.0
    assert expected_psnr(replace(plan, forecast={"psnr_db": 30.5})) == 30.5
    assert expected_psnr(made_up_plan()) is None
    assert expected_psnr(replace(plan, measured={"psnr_db": "high"})) is None


def test_the_front_is_a_figure_and_a_table():
    page = shown()
    assert len(page.rows["front"]) == 1 + len(made_up_front().points)
    assert page.rows["front"][2] == ["1.50x", "50.0 %", "0.02", "35.0 dB"]
    for words in ("forecast of the search", "searched, forecast", "uniform, measured", "5 points"):
        assert words in page.text["front"]
    assert "Not at hand" in shown(front=None).text["front"]


def test_a_front_without_psnr_shows_errors():
    points = tuple(p.model_copy(update={"psnr": None}) for p in made_up_front().points)
    page = shown(front=replace(made_up_front(), points=points))
    assert "forecast error of heads" in page.text["front"]
    assert "measured" not in page.text["front"].split("All points")[0].split("Marks:")[0]
    assert page.rows["front"][2] == ["1.50x", "50.0 %", "0.02", "-"]


def test_the_line_of_the_front_is_what_nothing_beats():
    points = [(p.speedup, p.psnr) for p in made_up_front().points]
    (axes,) = front_curve(points).axes
    assert list(zip(*axes.lines[0].get_data(), strict=True)) == [(1.5, 35), (2, 29), (3, 21)]
    assert len(axes.collections[0].get_offsets()) == 4  # all but the dense end
    figure = front_curve(points, promised=Point("<b>", 1.6, 30), measured=[Point("a", 1.5, 29)])
    assert "<b>" not in to_svg(figure, "x", "label")


def test_a_front_is_found_beside_its_plan(tmp_path):
    plan, file = made_up_plan(), tmp_path / "plan.json"
    plan.save(file)
    assert front_beside(str(file), plan) is None
    write_front(made_up_front(), front_path(file))
    assert front_beside(str(file), plan) == front_beside(str(tmp_path), plan) == made_up_front()
    write_front(replace(made_up_front(), config_hash="1" * 64), front_path(file))
    assert front_beside(str(file), plan) is None
    front_path(file).write_text("{")
    with pytest.raises(PlanError, match="search again"):
        front_beside(str(file), plan)


def test_a_difference_counts_heads_where_neither_plan_changes_its_stage():
    plan = made_up_plan()
    found = difference("other.json", coarser(plan), plan)
    first, second = found.ranges
    assert (first.sigma, first.heads, first.same, first.parameters) == ("1 to 0.9", 8, 0, 0)
    assert first.moves == {
        ("tile", "dense"): 4,
        ("stripe", "dense"): 2,
        ("window+far", "dense"): 2,
    }
    assert (second.sigma, second.heads, second.same, second.parameters) == ("0.9 to 0", 8, 4, 2)
    assert second.moves == {("tile", "window+far"): 2}
    assert found.facts == [("density", "0.250", "0.400")]


def test_a_difference_keeps_branches_apart():
    plan = made_up_plan(layers=1)
    part = plan.components["transformer"]
    stages = (Stage(1.0, 0.0, "cond"), Stage(1.0, 0.0, "uncond"))
    split = replace(plan, components={"transformer": replace(part, stages=stages)})
    found = difference("other.json", plan, split)
    counts = {r.sigma: (r.same, r.heads) for r in found.ranges}
    assert counts == {
        "1 to 0.9, cond": (4, 4),
        "1 to 0.9, uncond": (0, 4),
        "0.9 to 0, cond": (0, 4),
        "0.9 to 0, uncond": (4, 4),
    }


def test_where_a_plan_has_no_layer_it_is_stock():
    less, more = made_up_plan(layers=1), made_up_plan(layers=2)
    (_, second) = difference("less", less, more).ranges
    assert (second.heads, second.same, second.moves["stock", "window+far"]) == (8, 4, 2)


def test_the_page_shows_the_difference():
    page = shown()
    text = page.text["difference"]
    assert "What changed from other.json to this plan" in text
    assert "density: 0.25 -> 0.4" in text  # line by line
    assert ["density", "0.250", "0.400"] in page.rows["difference"]
    kinds = [row[-1] for row in page.rows["difference"] if row[0] == "transformer, 0.9 to 0"]
    assert kinds == ["tile to window+far: 2"]
    same = shown(difference=difference("<same>", made_up_plan(), made_up_plan()))
    assert "This plan and <same> are equal" in same.text["difference"]
    assert "difference" not in shown(difference=None).text


def test_a_long_difference_is_cut():
    found = difference("other", made_up_plan(layers=400), made_up_plan(layers=1))
    assert len(found.lines) > 300
    assert f"{len(found.lines) - 300} more" in shown(difference=found).text["difference"]
    assert "more:" not in shown().text["difference"]


def test_another_size_than_calibrated_is_said():
    small = made_up_quality(layout=TokenLayout.video(4, 4, 4, text_after=7))
    page = shown(quality=small)
    said = (
        "The plan was calibrated at 8x16x16 (2,048 tokens), and is measured here at "
        "4x4x4 + 7 global (71 tokens)"
    )
    assert said in page.text["head"] and said in page.text["forecasts"]
    assert "other than calibrated" in page.text["head"]
    assert said in " ".join(to_json(made_up_report(quality=small))["notes"])
    here = shown(quality=made_up_quality(layout=TokenLayout.video(8, 16, 16)))
    assert "was calibrated at" not in here.text["head"] + here.text["forecasts"]
    assert "as calibrated" in here.text["head"]
    assert other_size(made_up_plan(), None) is None


def test_sizes_are_a_table():
    rows = shown().rows["sizes"]
    assert [row[2] for row in rows[1:]] == ["elsewhere", "here"]
    assert rows[1][0] == "48x48, 7 frames" and rows[2][1] == "2048 (8x16x16)"
    assert "sizes" not in shown(sizes=()).text


@pytest.mark.parametrize(
    "text", ["", "64x64", "64x64x0", "64x64x17,", "64 64 17", "-1x64x17", "64x64x17x2"]
)
def test_sizes_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="WIDTHxHEIGHTxFRAMES"):
        parse_sizes(text)


def test_sizes_are_read():
    assert parse_sizes("192x128x15, 64x64x17") == [(192, 128, 15), (64, 64, 17)]
    with pytest.raises(ValueError, match="each size once"):
        parse_sizes("64x64x17,64x64x17")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Wan in a folder, with a plan made at 64x64 and another one."""
    folder = tmp_path_factory.mktemp("model")
    pipe = wan()[0]
    pipe.save_pretrained(folder / "model")
    plan = uniform_plan(pipe, WINDOW, TokenLayout.video(5, 4, 4))
    plan.save(folder / "plan.json")
    hash_of = plan.components["transformer"].config_hash
    write_front(replace(made_up_front(), config_hash=hash_of), folder / "plan.front.json")
    part = replace(plan.components["transformer"], stages=(Stage(0.5, 0.0),))
    replace(plan, components={"transformer": part}).save(folder / "other.json")
    return folder


SETTINGS = GenerationSettings(64, 64, 17, steps=2, guidance=1.0, max_sequence_length=16)


def test_a_plan_is_measured_at_several_sizes(model):
    pipe, plan = wan()[0], Plan.load(model / "plan.json")
    sizes = [(64, 64, 17), (96, 64, 9)]
    first, second = evaluate_sizes(pipe, plan, [Case("a cat", 0)], SETTINGS, sizes, lambda _: None)
    assert (first.layout, first.tokens, first.calibrated) == ("5x4x4", 80, True)
    assert (second.layout, second.tokens, second.calibrated) == ("3x4x6", 72, False)
    assert calibrated_at(plan) == [TokenLayout.video(5, 4, 4)]
    assert 0 < second.density < 1 and second.psnr_db > second.psnr_flat_db


def test_a_size_that_cannot_be_made_stops_it_before_the_first_run(model):
    said = []
    with pytest.raises(ValueError, match="multiple of 16"):
        evaluate_sizes(
            wan()[0],
            Plan.load(model / "plan.json"),
            [Case("a cat", 0)],
            SETTINGS,
            [(64, 64, 17), (100, 64, 17)],
            said.append,
        )
    assert not said


def test_the_command_puts_it_all_on_the_page(model, tmp_path, capsys):
    arguments = [
        "eval", str(model / "model"), str(model / "plan.json"), "--prompt", "a cat",
        "--height", "64", "--width", "96", "--num-frames", "17", "--steps", "2", "--guidance", "1",
        "--max-sequence-length", "16", "--out", str(tmp_path),
    ]  # fmt: skip
    more = ["--against", str(model / "other.json"), "--sizes", "64x64x17,96x64x17"]
    assert cli.run([*arguments, *more]) == 0, capsys.readouterr().err
    page = Sections((tmp_path / "report.html").read_text())
    assert "calibrated at 5x4x4 (80 tokens), and is measured here at 5x4x6" in page.text["head"]
    assert [row[2] for row in page.rows["sizes"][1:]] == ["elsewhere", "here"]  # one row a size
    assert "other.json" in page.text["difference"]
    assert len(page.rows["front"]) == 6
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["layout"] == "5x4x6" and data["calibrated_layouts"] == ["5x4x4"]
    assert [row["calibrated"] for row in data["sizes"]] == [False, True]
    assert [point["psnr"] for point in data["front"]][:2] == [100, 35]
    assert data["difference"]["ranges"][-1]["same"] > 0
    assert data["forecasts"][0]["forecast"] == 1.5
    assert "was calibrated at" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sizes", "64"], "WIDTHxHEIGHTxFRAMES"),
        (["--sizes", "100x64x17"], "multiple of 16"),
        (["--against", "nowhere.json"], "no plan"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(model, tmp_path, more, message, capsys):
    arguments = [
        "eval", str(model / "model"), str(model / "plan.json"), "--prompt", "a cat",
        "--height", "64", "--width", "64", "--num-frames", "17", "--steps", "2",
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    assert cli.run([*arguments, *more]) == 2
    said = capsys.readouterr().err
    assert message in said and "warm-up" not in said and not (tmp_path / "out").exists()


def test_the_atlas_shows_each_heads_attention_mask_error_and_runner_up():
    report = made_up_report()
    text = render_page(report, [], [], ("a.mp4", "b.mp4", "c.mp4"))
    cards = [card.split("</li>")[0] for card in text.split('<ul class="heads">')[-1].split("<li>")]
    third = cards[3]  # the last layer's head 2 in the last stage
    assert 'alt="attention of blocks.1.attn1 head 2"' in third
    assert 'alt="mask of blocks.1.attn1 head 2: window' in third
    assert "error 0.1, recall" in third and "next best: stripe, error 0.14" in third
    assert "attention of" not in cards[4]  # it wasn't recorded
