"""Plans from few calibration prompts against plans from more: counted, judged held-out, resumed."""

import json
from dataclasses import replace

import pytest
import torch

from sparse_dit import cli
from sparse_dit.eval import repeats
from sparse_dit.eval import stability as module
from sparse_dit.eval.repeats import spread_of
from sparse_dit.eval.stability import stability
from sparse_dit.eval.stability_file import RepeatRow, StabilityRequest
from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.integrations.diffusers import attachment_of
from sparse_dit.search.check import check_plan
from sparse_dit.search.profile_file import read_profile
from sparse_dit.search.verify import verify
from tests.helpers.search_cases import stub_costs
from tests.helpers.tiny_pipelines import wan

SETTINGS = GenerationSettings(64, 64, 17, steps=4, guidance=1.0, max_sequence_length=16)
CASES = [Case(f"a {animal} in the rain", i) for i, animal in enumerate(("cat", "dog", "cow"))]
LATER = [Case("a boat on a lake", 9)]


def asked(file, **changes):
    values = {"counts": (1, 2), "density": 0.4, "profile_steps": 2, "rows": 8, "generate": True}
    return StabilityRequest(CASES, LATER, SETTINGS, file, **{**values, **changes})


@pytest.fixture(scope="module")
def pipe():
    return wan()[0]


@pytest.fixture(scope="module")
def done(pipe, tmp_path_factory):
    """A request, its rows, and what was said."""
    said = []
    request = asked(tmp_path_factory.mktemp("stability") / "result.json")
    return request, stability(pipe, request, said.append).rows, said


def test_every_count_has_a_row(done):
    _, (one, two), _ = done
    assert (one.prompts, two.prompts) == (1, 2)
    assert one.density <= 0.4 and two.density <= 0.4
    assert (two.same_pattern, two.same_kind, two.near_density, two.loss) == (1, 1, 1, 1)
    assert one.same_pattern <= one.same_kind <= 1
    assert all(0 < row.held_out_error < 2 and row.psnr_db > 5 for row in (one, two))
    assert all(row.psnr_least_db == row.psnr_db for row in (one, two))  # of one held-out prompt


def test_the_pipeline_is_left_as_it_was(pipe, done):
    assert attachment_of(pipe.transformer) is None


def test_the_file_and_the_profiles_say_the_same(done):
    request, rows, _ = done
    data = json.loads(request.file.read_text())
    assert [row["loss"] for row in data["rows"]] == [row.loss for row in rows]
    assert data["conditions"]["held_out"] == [["a boat on a lake", 9]]
    for count in request.counts:
        profile = read_profile(request.profiles / f"{count}-prompts.safetensors")
        assert len(profile.done) == 2  # one prompt is run twice


def test_heads_are_compared_by_what_they_compute(pipe, done):
    request, rows, _ = done
    state = module.StabilityState.started(request, read_hash(request))
    one, two = module._solve_all(pipe, "transformer", request, state, lambda _: None)
    pairs = list(zip(one.patterns, two.patterns, strict=True))
    assert rows[0].same_pattern == pytest.approx(
        sum(a == b for a, b in pairs) / len(pairs), abs=1e-3
    )
    kinds = [(a.name, a.tile, a.far) == (b.name, b.tile, b.far) for a, b in pairs]
    assert rows[0].same_kind == pytest.approx(sum(kinds) / len(pairs), abs=1e-3)


def read_hash(request):
    return json.loads(request.file.read_text())["conditions"]["model"]


def test_held_out_errors_are_those_that_a_check_finds(pipe, done):
    """Two ways to measure the same: all rows sampled, so that neither is by chance."""
    request = replace(done[0], rows=80)  # every token
    state = module.StabilityState.started(done[0], read_hash(done[0]))
    solved = module._solve_all(pipe, "transformer", done[0], state, lambda _: None)
    errors = module._held_out_errors(pipe, "transformer", request, solved)
    plan = replace(solved[0].plan, provenance={"errors_behind_projection": True})
    settings = replace(SETTINGS, steps=len(solved[0].part.sigmas))
    checked = check_plan(pipe, plan, LATER[0], settings, rows=80)
    place = {unit: i for i, unit in enumerate(solved[0].problem.units)}
    assert checked.heads
    for head in checked.heads:
        found = errors[place[head.stage, head.layer, head.head], 0].sqrt().item()
        assert found == pytest.approx(head.now, rel=1e-3, abs=1e-5)
    dense = torch.tensor([pattern.is_dense for pattern in solved[0].patterns])
    assert (errors[dense, 0] == 0).all()


def test_a_finished_file_takes_no_runs(pipe, done, monkeypatch):
    request, rows, _ = done

    def refused(*args, **options):
        raise AssertionError("nothing is left to run")

    for name in ("sensitivity", "score_patterns", "verify", "dense_reference"):
        monkeypatch.setattr(module, name, refused)
    assert stability(pipe, request, lambda _: None).rows == rows


def test_a_stopped_run_goes_on(pipe, done, tmp_path, monkeypatch):
    _, rows, _ = done
    request = asked(tmp_path / "result.json")

    def stopped(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "verify", stopped)
        with pytest.raises(KeyboardInterrupt):
            stability(pipe, request, lambda _: None)
    kept = json.loads(request.file.read_text())["rows"]
    assert [row["psnr_db"] for row in kept] == [None, None] and kept[0]["loss"] == rows[0].loss
    with monkeypatch.context() as patch:
        patch.setattr(module, "score_patterns", stopped)
        assert stability(pipe, request, lambda _: None).rows == rows


@pytest.fixture
def repeated(pipe, tmp_path, monkeypatch):
    """A request of three searches, what they gave, and how many plans were generated with."""
    stub_costs(monkeypatch)
    tried = []

    def counted(work, plan, references):
        tried.append(plan)
        return verify(work, plan, references)

    monkeypatch.setattr(module, "verify", counted)
    request = asked(tmp_path / "result.json", counts=(1,), repeats=3)
    return request, stability(pipe, request, lambda _: None), tried


def test_repeated_searches_are_the_same_and_generated_once(pipe, repeated, monkeypatch):
    request, found, tried = repeated
    assert len(found.repeats) == 3 and len(tried) == 2  # a plan from one prompt, and one of three
    first = found.repeats[0]
    assert all(row == first for row in found.repeats) and first.same_pattern == 1
    assert 0 < first.density <= 0.4 and len(first.psnr) == 1
    apart, mean, least, most = spread_of(found.repeats)
    assert (apart, mean) == (0, 0) and least == most == pytest.approx(first.psnr[0])
    for name in ("cost_tables", "sensitivity", "profile_pipeline"):
        monkeypatch.setattr(repeats, name, None)  # nothing is measured again
    again = stability(pipe, request, lambda _: None)
    assert again.repeats == found.repeats and len(tried) == 2


def test_searches_that_differ_say_by_how_much():
    rows = [RepeatRow(0.3, 0.1, 1.0, [30.0, 20.0]), RepeatRow(0.3, 0.1, 0.9, [31.0, 16.0])]
    assert spread_of(rows) == (4.0, 1.5, 18.0, 30.5)
    assert spread_of([RepeatRow(0.3, 0.1, 1.0)]) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no stability file"),
        ('{"format": "another"}', "is no stability file"),
        ("other", "another model, other prompts or settings"),
    ],
)
def test_another_file_is_refused_and_kept(pipe, done, tmp_path, text, message):
    file = tmp_path / "result.json"
    file.write_text(done[0].file.read_text() if text == "other" else text)
    before = file.read_text()
    with pytest.raises(ValueError, match=message):
        stability(pipe, asked(file, density=0.39), lambda _: None)
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density": 1.0}, "density must be between 0 and 1"),
        ({"density": float("nan")}, "density must be between 0 and 1"),
        ({"counts": (2, 1)}, "that rise"),
        ({"counts": ()}, "that rise"),
        ({"counts": (0, 1)}, "that rise"),
        ({"counts": (1, 4)}, "must hold 4 prompts, got 3"),
    ],
)
def test_requests_that_mean_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        asked(tmp_path / "x.json", **changes)
    with pytest.raises(ValueError, match="at least one held-out"):
        StabilityRequest(CASES, [], SETTINGS, tmp_path / "x.json", (1,))
    with pytest.raises(ValueError, match="must not be calibration prompts"):
        StabilityRequest(CASES, [Case(CASES[0].prompt, 77)], SETTINGS, tmp_path / "x.json", (1,))


def test_a_density_out_of_reach_is_said(pipe, done, monkeypatch):
    monkeypatch.setattr(module, "least_loss", lambda problem, speedup: None)
    with pytest.raises(ValueError, match=r"density must be at least 0\.000 at this size, got 0\.4"):
        stability(pipe, done[0], lambda _: None)


def test_the_command(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "model")
    arguments = [
        "stability", str(tmp_path / "model"), "--json", str(tmp_path / "s.json"), "--count", "1",
        "--count", "2", "--prompt", "a cat", "--prompt", "a dog", "--held-out", "a boat",
        "--rows", "8", "--height", "64", "--width", "64", "--num-frames", "9", "--steps", "4",
        "--guidance", "1", "--max-sequence-length", "16", "--repeat", "2",
    ]  # fmt: skip
    assert cli.run(arguments) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert "same kind" in said.out and "not measured" in said.out and "s.json" in said.out
    assert "profiling 2 prompts" in said.err and "search 2 of 2" in said.err
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert [row["prompts"] for row in rows] == [1, 2]
    lacking = [a for a in arguments if a not in ("--held-out", "a boat")]
    assert cli.run(lacking) == 2
    assert "held-out prompt" in capsys.readouterr().err
    assert cli.run(["stability", "nowhere", "--height", "64", "--width", "64"]) == 2
    assert "no folder nowhere" in capsys.readouterr().err
