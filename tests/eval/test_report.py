"""The report: numbers that can be read back, a page that stands alone and opens in a browser."""

import html.parser
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparse_dit.entry import expand
from sparse_dit.eval.atlas import stage_atlas
from sparse_dit.eval.figures import Point, quality_over_speed, to_svg
from sparse_dit.eval.metrics import METRICS, Metric, relative_error
from sparse_dit.eval.pictures import attention_image, mask_image, mask_map
from sparse_dit.eval.report import Report
from sparse_dit.eval.report_files import FILES, to_json, write_report
from sparse_dit.eval.sentences import findings, limits
from sparse_dit.index import pattern_index
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Pattern, Skip, Window
from tests.helpers.eval_cases import made_up_plan, made_up_quality, made_up_report

KEYS = {
    *("tokens", "dense_seconds", "sparse_seconds", "speedup", "forecast_speedup", "density"),
    *("psnr_db", "psnr_flat_db", "psnr_noise_floor_db", "psnr_uniform_db", "psnr_random_db"),
    *("ssim", "search_seconds", "search_dense_generations", "seam_overhead"),
    *("drift", "teacher_forced"),
}
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "out"
    write_report(folder, made_up_report())
    return folder


def test_search_time_is_said_in_dense_generations(written):
    data = strict_json((written / "report.json").read_text())
    ratio = data["search_seconds"] / data["dense_seconds"]
    assert data["search_dense_generations"] == pytest.approx(ratio)
    assert f"{ratio:.1f} dense generations" in (written / "report.html").read_text()


def strict_json(text):
    def refuse(name):
        raise AssertionError(f"{name} in JSON")

    return json.loads(text, parse_constant=refuse)


def test_all_files_are_there(written):
    assert sorted(path.name for path in written.iterdir()) == sorted(FILES)


def test_the_json_holds_what_was_measured(written):
    data = strict_json((written / "report.json").read_text())
    assert data.keys() >= KEYS
    assert data["psnr_db"] == 34.0
    assert data["psnr_min_db"] == 33.5
    assert data["speedup"] == pytest.approx(12.5 / 8)
    assert data["psnr_uniform_db"] == 24.0
    assert data["psnr_random_db"] == 19.0
    assert data["psnr_noise_floor_db"] == 71.0
    assert len(data["heads"]) == 2 * 2 * 4
    assert data["settings"]["num_frames"] == 7
    assert "A note of the measurer." in data["notes"]


def test_what_json_cannot_say_is_null_with_a_note():
    case = made_up_quality().cases[0]
    equal = made_up_quality(cases=[replace(case, psnr_db=math.inf)])
    data = to_json(made_up_report(quality=equal))
    assert data["psnr_db"] is None
    assert "psnr_db is null because it is infinite: equal in every value" in data["notes"]
    broken = made_up_quality(
        cases=[replace(case, psnr_db=math.nan, drift=[0.1, math.nan], nonfinite_sparse=7)]
    )
    data = to_json(made_up_report(quality=broken))
    assert data["psnr_db"] is None and data["drift"][1] is None
    assert data["nonfinite_values"] == 7
    assert any("NaN or infinite" in note for note in data["notes"])
    json.dumps(data, allow_nan=False)


def test_nothing_measured_is_said(tmp_path):
    quality = made_up_quality(
        forecast_speedup=None,
        interleaved=False,
        cases=[
            replace(made_up_quality().cases[0], psnr_noise_floor_db=None, metrics={"ssim": None})
        ],
    )
    report = Report("bare", made_up_plan(), quality)
    write_report(tmp_path / "bare", report)
    data = strict_json((tmp_path / "bare" / "report.json").read_text())
    assert data["psnr_uniform_db"] is None and data["search_seconds"] is None
    assert data["search_dense_generations"] is None
    said = " ".join(data["notes"])
    for absent in ("uniform", "random", "teacher-forced", "search time", "recall", "SSIM"):
        assert absent in said
    assert "noise floor was not measured" in said and "not in turn" in said
    assert not (tmp_path / "bare" / "atlas.png").exists()


def test_a_metric_that_is_added_in_its_one_place_is_written_and_shown(monkeypatch, tmp_path):
    """Adding one touches metrics.py and the page of docs that lists what report.json has."""
    monkeypatch.setitem(METRICS, "distance", Metric("relative distance", relative_error))
    cases = [replace(c, metrics={"ssim": 0.9, "distance": 0.125}) for c in made_up_quality().cases]
    write_report(tmp_path / "out", made_up_report(quality=made_up_quality(cases=cases)))
    assert strict_json((tmp_path / "out" / "report.json").read_text())["distance"] == 0.125
    page = (tmp_path / "out" / "report.html").read_text()
    assert "relative distance" in page and page.count("0.125") == len(cases) + 1


def test_unwelcome_findings_are_said():
    slow = [replace(case, dense_seconds=4.0, psnr_db=15.0) for case in made_up_quality().cases]
    said = " ".join(findings(made_up_report(quality=made_up_quality(cases=slow))))
    assert "slower than dense" in said
    assert "not clearly above the flat image" in said
    assert "FURTHER from dense than the uniform plan" in said
    assert "other hardware" in " ".join(limits(made_up_report()))


def test_a_plan_that_computes_everything_is_not_infinitely_closer():
    report = made_up_report()
    exact = replace(report, baselines=[replace(report.baselines[0], psnr_db=math.inf)])
    said = " ".join(findings(exact))
    assert "The uniform plan gave the dense videos themselves" in said and "inf dB" not in said


def test_nothing_is_overwritten_unasked(written):
    before = (written / "report.json").read_bytes()
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        write_report(written, made_up_report(title="another"))
    assert (written / "report.json").read_bytes() == before
    write_report(written, made_up_report(), overwrite=True)
    assert sorted(path.name for path in written.iterdir()) == sorted(FILES)


class Page(html.parser.HTMLParser):
    """Every tag and its attributes, and whether tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link", "input", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone(written):
    text = (written / "report.html").read_text()
    page = Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "poster", "srcset", "data"):
            target = attributes.get(name)
            if target is None or target.startswith(("data:image/", "#")):
                continue
            assert (tag, name) == ("video", "src"), (tag, name, target)
            assert (written / target).is_file() and "/" not in target
        assert tag not in {"script", "link", "iframe", "object"}
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\((?!#|data:)|@import", text)


def test_the_page_is_accessible(written):
    page = Page((written / "report.html").read_text())
    kinds = [tag for tag, _ in page.tags]
    assert kinds.count("table") == kinds.count("caption") > 0
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    assert all(attributes.get("aria-label") for tag, attributes in page.tags if tag == "video")
    assert all(a.get("aria-label") for tag, a in page.tags if tag == "svg")
    assert ("html", {"lang": "en"}) in page.tags
    assert any(a.get("name") == "viewport" for _, a in page.tags)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_prompts_are_text_not_markup(written):
    text = (written / "report.html").read_text()
    assert "&lt;right&gt;" in text and "<right>" not in text
    nasty = made_up_report(title="</title><script>alert(1)</script>")
    nasty = replace(
        nasty, baselines=[replace(nasty.baselines[0], name="<script>alert(2)</script>")]
    )
    from sparse_dit.eval.page import render_page

    assert "<script" not in render_page(nasty, [], [], ("a.mp4", "b.mp4", "c.mp4"))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to open the page in")
def test_a_browser_shows_it(written, tmp_path):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=400,6000",
    ]  # fmt: skip
    url = (written / "report.html").as_uri()
    shot = tmp_path / "shot.png"
    subprocess.run(
        [*command, f"--screenshot={shot}", url], check=True, capture_output=True, timeout=120
    )
    import imageio.v3 as iio

    pixels = iio.imread(shot)[..., :3]
    assert pixels.shape[:2] == (6000, 400)
    assert pixels[:5000].std() > 20  # something is drawn down the page
    wide = 'document.documentElement.scrollWidth > innerWidth ? "too wide" : "fits"'
    page = tmp_path / "probe.html"
    page.write_text(
        (written / "report.html")
        .read_text()
        .replace("</body>", f"<script>document.title = {wide}</script></body>")
    )
    result = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], check=True, capture_output=True, timeout=120
    )
    assert b"<title>fits</title>" in result.stdout


def test_the_mask_map_counts_every_pair():
    layout = TokenLayout.video(3, 5, 7, text_after=4)
    pattern = Pattern(Window(frames=0, rows=1, columns=2), tile=(2, 2, 2), far=True)
    entry = pattern_index(pattern, layout)
    exact, far = torch.zeros(109, 109), torch.zeros(109, 109)
    for group in range(entry.num_groups):
        rows = slice(*entry.q_offsets[group : group + 2].tolist())
        runs = entry.runs[entry.run_offsets[group] : entry.run_offsets[group + 1]]
        exact[rows, expand(runs)] = 1
        cells = entry.far.runs[entry.far.run_offsets[group] : entry.far.run_offsets[group + 1]]
        for cell in expand(cells):
            far[rows, slice(*entry.far.cell_offsets[cell : cell + 2].tolist())] = 1
    full = mask_map(entry, 128)
    assert full.shape == (109, 109, 2)
    assert np.array_equal(full[..., 0], exact.numpy())
    assert np.array_equal(full[..., 1], far.numpy())
    small = mask_map(entry, 10)
    edges = [i * 109 // 10 for i in range(11)]
    expected = [
        [exact[a:b, c:d].mean().item() for c, d in itertools.pairwise(edges)]
        for a, b in itertools.pairwise(edges)
    ]
    assert np.allclose(small[..., 0], expected, atol=1e-6)


def test_pictures():
    entry = pattern_index(Pattern(Skip()), TokenLayout.video(2, 4, 4))
    assert np.unique(np.asarray(mask_image(mask_map(entry))).reshape(-1, 3), axis=0).shape == (1, 3)
    assert attention_image(np.eye(128), size=96).size == (96, 96)
    assert attention_image(np.zeros((8, 8))).size == (8, 8)
    broken = np.eye(8)
    broken[2, 3] = math.nan
    assert attention_image(broken).getpixel((3, 2)) == (255, 0, 255)
    for bad in (np.zeros((129, 129)), np.zeros(4), -np.eye(4)):
        with pytest.raises(ValueError, match="attention"):
            attention_image(bad)


def test_the_atlas_is_of_one_stage():
    component = made_up_plan().components["transformer"]
    atlas = stage_atlas("transformer", component, 0, component.layout)
    assert atlas.density == 1
    cell = stage_atlas("transformer", component, 1, component.layout).layers["blocks.1.attn1"][2]
    assert (cell.head, cell.pattern.name, cell.error) == (2, "window", 0.1)
    assert cell.mask.shape == (96, 96, 2)
    assert cell.density == pytest.approx(pattern_index(cell.pattern, component.layout).density)


def test_figures_leave_out_what_is_not_finite_and_escape_names():
    svg = to_svg(
        quality_over_speed([Point("<b>", 1.2, 30.0), Point("equal", 1.0, math.inf)]), "x", "label"
    )
    assert "<b>" not in svg and "currentColor" in svg and "#0102fe" not in svg
    assert "equal" not in svg


def test_matplotlib_is_left_alone():
    code = (
        "import matplotlib; matplotlib.use('svg'); "
        "from sparse_dit.eval.figures import drift_curve, to_svg; "
        "to_svg(drift_curve({'a': [0.0, 1.0]}), 'a', 'b'); print(matplotlib.get_backend())"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "svg"
