"""benchmarks/wan_step.py in its dry mode: on the CPU, tiny."""

import json

import pytest
import torch

from benchmarks import wan_step
from benchmarks.step_models import CASES, DRY

QUICK = ["--dry", "--density", ".3", "--rounds", "1"]
WAYS = [  # compiled, cache, a plan, sparse
    (False, False, False, False), (False, False, True, False), (True, False, False, False),
    (False, True, False, False), (False, False, True, True), (True, False, True, True),
    (True, False, True, True), (False, True, True, True),
]  # fmt: skip


def test_every_way_of_every_model(tmp_path, capsys):
    file = tmp_path / "steps.json"
    assert wan_step.main([*QUICK, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    said = capsys.readouterr().out
    assert report["dry"] and report["done"] and "say nothing of a GPU" in said
    assert [case["case"] for case in report["cases"]] == list(DRY)
    for case in report["cases"]:
        rows = case["rows"]
        ways = [
            (r["compiled"], r["cache"] == "taylorseer=2:2", r["name"] != "stock", r["density"] < 1)
            for r in rows
        ]
        assert ways == WAYS
        assert [r["name"].endswith("sorted once") for r in rows] == [False] * 6 + [True, False]
        dense = {True: rows[2]["seconds"], False: rows[0]["seconds"]}
        for row, (compiled, cache, _, sparse) in zip(rows, WAYS, strict=True):
            assert row["speedup"] == pytest.approx(dense[compiled] / row["seconds"])
            assert (row["forecast"] is not None) == (sparse and not cache)
            assert row["backends"] == (["cpu"] if sparse else row["backends"])
            assert [counts for counts, _ in row["measured"]] == [case["blocks"]]
        assert f"{case['case']}: {case['tokens']} tokens, layers measured: " in said


def test_fewer_blocks_are_measured_twice_and_scaled_plainly(tmp_path, capsys):
    file = tmp_path / "steps.json"
    asked = ["--case", "wan", "--layers", "2", "--json", str(file)]
    assert wan_step.main([*QUICK, *asked]) == 0
    assert "layers measured: 2 of 3 blocks" in capsys.readouterr().out
    (case,) = json.loads(file.read_text())["cases"]
    assert case["layers measured"] == {"blocks": 2} and case["blocks"] == {"blocks": 3}
    for row in case["rows"]:
        (two, seconds), (one, less) = row["measured"]
        assert (two, one) == ({"blocks": 2}, {"blocks": 1})
        assert row["seconds"] == pytest.approx(2 * seconds - less)


def test_a_step_of_all_blocks_is_reckoned_from_those_of_some():
    """1 second, and 2 for each block of one list and 3 of the other."""
    counts = [{"a": 4, "b": 6}, {"a": 2, "b": 6}, {"a": 4, "b": 3}]
    measured = [(c, 1.0 + 2 * c["a"] + 3 * c["b"]) for c in counts]
    assert wan_step.whole(measured, {"a": 20, "b": 40}) == pytest.approx(1 + 40 + 120)
    assert wan_step.whole(measured[:1], counts[0]) == measured[0][1]


def test_a_run_that_is_stopped_keeps_what_it_measured(tmp_path, monkeypatch):
    file, lines = tmp_path / "steps.json", []

    def stopped(row):
        lines.append(row)
        if len(lines) == 2:
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(wan_step, "_line", stopped)
    with pytest.raises(KeyboardInterrupt):
        wan_step.main([*QUICK, "--case", "wan", "--json", str(file)])
    report = json.loads(file.read_text())
    assert not report["done"] and len(report["cases"][0]["rows"]) == 2


def test_a_case_that_is_too_large_is_told_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    file = tmp_path / "steps.json"

    def too_large(case, *arguments):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(wan_step, "_measure", too_large)
    assert wan_step.main([*QUICK, "--case", "wan", "minimax-h3", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert [case["error"] for case in report["cases"]] == ["no room; try fewer --layers"] * 2
    assert "no room" in capsys.readouterr().err


def test_sizes_are_those_of_the_models():
    tokens = {name: case.layout.seq_len for name, case in CASES.items()}
    assert tokens == {
        "wan-1.3b-480p": 32760, "wan-1.3b-720p": 75600, "wan-14b-480p": 32760, "wan-14b-720p": 75600,
        "hunyuanvideo-720p": 118800 + 256, "minimax-h3-768p": 37296 + 670,
    }  # fmt: skip


def test_what_is_wrong_is_said(capsys):
    for words, said in (
        (["--dry", "--case", "wan-14b-720p"], "no tiny case"),
        (["--dry", "--layers", "1"], "at least 2"),
    ):
        with pytest.raises(SystemExit):
            wan_step.main(words)
        assert said in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert wan_step.main([]) == 2 and "--dry" in capsys.readouterr().err
