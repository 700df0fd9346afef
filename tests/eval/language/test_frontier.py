"""Searched plans against published rules: the rows, equal time, and the command as a person types it."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from sparse_dit import cli
from sparse_dit.eval.baselines.text import RULES
from sparse_dit.eval.language import frontier as module
from sparse_dit.eval.language.frontier import LanguageFrontier, densities_of, figure_of, frontier
from sparse_dit.eval.language.quality import LanguageRequest
from sparse_dit.outputs import Outputs
from sparse_dit.patch import patch
from sparse_dit.search.language.reading import Text, read
from tests.helpers.language_plans import NEAR, SLASH, plan_for
from tests.helpers.tiny_language_models import save_language_model, text, tokenizer

KEYS = {"method", "source", "target", "density", "speedup", "seconds", "dense_seconds", "kl"}
KEYS |= {"index_seconds", "perplexity_increase", "kl_floor", "passkeys", "dense_passkeys", "asked"}


@pytest.fixture(scope="module")
def model():
    return text("llama")[0]


def drawn():
    codes = torch.randint(32, 127, (600,), generator=torch.Generator().manual_seed(1))
    return "".join(map(chr, codes.tolist()))


def request(model, folder, **changes):
    given = {
        "reading": LanguageRequest(texts={"book": drawn()}, tokens=600),
        "plans": {"found": plan_for(model, NEAR, SLASH)},
        "densities": (0.4, 0.6),
        "methods": ("moa-uniform", "xattention-8"),
        "file": folder / "rows.json",
    }
    return LanguageFrontier(**{**given, **changes})


def measured(model, asked, said=None):
    outputs = Outputs(replace=True, say=print)
    say = (lambda text: None) if said is None else said.append
    return frontier(model, tokenizer(), asked, say, outputs)


def test_rows_are_plans_and_then_rules_at_densities_and_at_equal_time(model, tmp_path):
    rows = measured(model, request(model, tmp_path))
    targets = [(row["target"], row["method"]) for row in rows]
    names = ("moa-uniform", "xattention-8")
    assert targets == [
        ("found", "found"),
        *((at, name) for at in (0.4, 0.6, "found") for name in names),
    ]
    assert all(row.keys() >= KEYS for row in rows)
    for row in rows:
        assert row["kl_floor"] < 1e-6 < row["kl"] and row["asked"] == 5
        assert 0 < row["index_seconds"] < row["seconds"]
        if row["target"] in (0.4, 0.6):
            assert row["density"] == pytest.approx(row["target"], abs=0.12)
    kept = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert kept == rows


def test_a_file_of_another_model_text_or_plan_is_refused(model, tmp_path):
    asked = request(model, tmp_path, densities=(), methods=())
    measured(model, asked)
    other = LanguageRequest(texts={"book": drawn()[::-1]}, tokens=600)
    plan = plan_for(model, SLASH, NEAR)
    plan = replace(plan, density=asked.plans["found"].density)
    for change in ({"reading": other}, {"plans": {"found": plan}}):
        with pytest.raises(ValueError, match="rows of another model, plan or text"):
            replace(asked, **change).check(model)
    data = json.loads(asked.file.read_text())
    data["conditions"]["model"] = dict.fromkeys(data["conditions"]["model"], "0" * 64)
    asked.file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="rows of another model, plan or text"):
        asked.check(model)


def test_a_file_of_another_checkpoint_is_refused(model, tmp_path):
    asked = request(model, tmp_path, densities=(), methods=())
    rows = measured(model, asked)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight += 0.01
    with pytest.raises(ValueError, match="or of other weights"):
        asked.check(other)
    asked.check(other.to("meta"))  # nothing is known of them yet
    data = json.loads(asked.file.read_text())
    del data["conditions"]["weights"]  # as older files have none
    asked.file.write_text(json.dumps(data))
    assert measured(model, asked) == rows


def test_a_file_is_gone_on_with(model, tmp_path):
    less = request(model, tmp_path, methods=("moa-uniform",))
    first = measured(model, less)
    said = []
    both = measured(model, request(model, tmp_path), said)
    assert both[: len(first)] == first
    assert [row["method"] for row in both[len(first) :]] == ["xattention-8"] * 3
    said = []
    assert measured(model, request(model, tmp_path), said) == both and not said
    other = request(model, tmp_path, reading=LanguageRequest(texts={"other": drawn()}, tokens=500))
    with pytest.raises(ValueError, match="holds rows of another model, plan or text"):
        measured(model, other)


def test_a_plan_is_measured_as_patch_runs_it(model, tmp_path):
    asked = request(model, tmp_path, methods=())
    (row,) = measured(model, asked)
    reading = Text.of(tokenizer()(drawn(), return_tensors="pt").input_ids)
    dense = read(model, reading)
    with patch(model, asked.plans["found"]) as handle:
        sparse = read(model, reading)
    assert row["kl"] == pytest.approx(sparse.divergence(dense), abs=1e-6)
    assert row["density"] == pytest.approx(handle.summary().density, abs=1e-4)


def test_densities_of_rules_rise_with_their_numbers(model):
    reading = Text.of(torch.randint(5, 100, (600,)))
    found = densities_of(model, reading, ("moa-uniform", "flexprefill"))
    for method, densities in found.items():
        assert len(densities) == len(RULES[method].numbers)
        assert densities == sorted(densities) and densities[-1] <= 1


def test_equal_time_is_read_off_the_rows_of_the_method():
    rows = [
        {"method": "found", "target": "found", "speedup": 1.5, "density": 0.3},
        {"method": "moa-uniform", "target": 0.2, "speedup": 2.0, "density": 0.2},
        {"method": "moa-uniform", "target": 0.4, "speedup": 1.0, "density": 0.4},
        {"method": "minference", "target": 0.4, "speedup": 9.0, "density": 0.9},
    ]
    assert module._as_fast(rows, "found", "moa-uniform") == pytest.approx(0.3)
    with pytest.raises(ValueError, match="must be measured at a density first"):
        module._as_fast(rows, "found", "xattention-8")


def test_the_figure_has_a_line_for_each_method(model, tmp_path):
    figure = figure_of(measured(model, request(model, tmp_path, densities=(0.5,))))
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["found", "moa-uniform", "xattention-8"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"densities": (1.5,)}, "densities must lie between 0 and 1"),
        ({"methods": ("guess",)}, "methods must be among"),
    ],
)
def test_requests_out_of_range(model, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        request(model, tmp_path, **changes)


def test_the_command_writes_rows_and_a_figure(tmp_path, monkeypatch, model, capsys):
    save_language_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    plan_for(model, NEAR, SLASH).save("plan.json")
    typed = ["eval", "frontier", "--model", "language-model", "--text", "book.txt"]
    more = ["--plan", "plan.json", "--density", "0.5", "--method", "moa-uniform"]
    files = ["--json", "rows.json", "--plot", "rows.png"]
    assert cli.run([*typed, *more, *files]) == 0
    shown = capsys.readouterr().out
    assert "time of plan" in shown and "by another kernel" in shown
    assert (tmp_path / "rows.png").stat().st_size > 1000
    assert cli.run([*typed[:2], *typed[4:], *files]) == 2
    assert "--model and --text" in capsys.readouterr().err
    assert cli.run([*typed, *files, "--prompt", "a cat"]) == 2
    assert "are for pipelines" in capsys.readouterr().err
