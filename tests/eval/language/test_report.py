"""A plan measured on texts and questions, its report, and the command as a person types it."""

import json

import pytest
import torch

from sparse_dit import cli
from sparse_dit.eval.language.atlas import heads_figure, text_heads
from sparse_dit.eval.language.quality import LanguageRequest, evaluate
from sparse_dit.eval.language.report import (
    FILES,
    LanguageReport,
    findings,
    limits,
    task_rows,
    to_json,
    write_report,
)
from sparse_dit.search.language.reading import Text
from tests.helpers.language_plans import DENSE, NEAR, SLASH, plan_for
from tests.helpers.tiny_language_models import save_language_model, text, tokenizer

KINDS = ("needle in noise", "one fact")


@pytest.fixture(scope="module")
def model():
    return text("llama")[0]


def request(**changes):
    drawn = torch.randint(32, 127, (2, 400), generator=torch.Generator().manual_seed(1))
    texts = {f"text {n}": "".join(map(chr, codes)) for n, codes in enumerate(drawn.tolist())}
    given = {"texts": texts, "kinds": KINDS, "lengths": (600,), "samples": 2}
    return LanguageRequest(**{**given, **changes})


@pytest.fixture(scope="module")
def report(model):
    plan = plan_for(model, NEAR, SLASH, DENSE)
    quality = evaluate(model, tokenizer(), plan, request(), lambda text: None)
    heads = text_heads(model, plan, Text.of(torch.randint(5, 100, (400,))))
    return LanguageReport("A plan", plan, quality, heads, {"cpu": "a <machine>"})


def test_a_sparse_plan_differs_from_dense_by_more_than_rounding(report):
    for row in report.quality.texts:
        assert row.tokens == 400 and 0 < row.density < 1
        assert 0 <= row.kl_floor < 1e-6 < row.kl
        assert row.dense_perplexity != row.sparse_perplexity
    assert report.quality.sparse_calls == 2 * 2
    assert len(report.quality.pairs.speedups) == 2


def test_an_all_dense_plan_is_dense(model):
    quality = evaluate(model, tokenizer(), plan_for(model, DENSE), request(), lambda text: None)
    assert all(row.kl == 0 and row.density == 1 for row in quality.texts)
    assert all(asked.dense == asked.sparse for asked in quality.questions)
    report = LanguageReport("", plan_for(model, DENSE), quality, [])
    assert any("No attention call ran sparse" in line for line in findings(report))
    assert to_json(report)["speedup"] is None


def test_questions_are_five_passkeys_and_two_of_each_kind(report):
    rows = task_rows(report.quality)
    assert [(row.kind, row.count) for row in rows] == [("passkey", 5), *((k, 2) for k in KINDS)]
    asked = report.quality.of_kind("passkey")
    assert [question.question.depth for question in asked] == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert any(q.dense.log_prob != q.sparse.log_prob for q in report.quality.questions)


def test_a_model_that_knows_nothing_is_said_to(report):
    unable = next(line for line in limits(report) if line.startswith("Dense attention holds"))
    assert any(kind in unable for kind in ("passkey", *KINDS))


def test_every_head_has_its_density(report):
    assert len(report.heads) == 2 * 4
    dense = [head.density for head in report.heads if head.pattern == DENSE]
    assert dense == [1.0] * len(dense)
    assert all(0 < head.density < 0.6 for head in report.heads if head.pattern != DENSE)
    figure = heads_figure(report.heads)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert len({tuple(pixel) for pixel in figure.axes[0].images[0].get_array()[0]}) == 3


def test_the_files_hold_what_was_measured(report, tmp_path):
    files = write_report(tmp_path / "out", report)
    assert [file.name for file in files] == list(FILES)
    data = json.loads(files[1].read_text())
    assert data["density"] == pytest.approx(report.quality.density)
    assert data["texts"][0]["kl"] == report.quality.texts[0].kl
    assert len(data["heads"]) == 8 and len(data["questions"]) == 5 + 4
    page = files[0].read_text()
    assert "a &lt;machine&gt;" in page and "<script" not in page and "http" not in page
    assert f"{report.quality.kl:.4f} nats" in page
    for row in task_rows(report.quality):
        assert f"{row.dense_log_prob:.2f}" in page and f"{row.floor:.2f}" in page
    with pytest.raises(FileExistsError):
        write_report(tmp_path / "out", report)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"texts": {}}, "got none; give --text FILE"),
        ({"kinds": ("riddle",)}, "tasks must be among .*got \\['riddle'\\]"),
        ({"tokens": 9}, "tokens must be at least 256, got \\[9\\]"),
        ({"lengths": (400, 9)}, "lengths must be at least 256"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
    ],
)
def test_requests_out_of_range(changes, words):
    with pytest.raises(ValueError, match=words):
        request(**changes)


def test_a_text_that_is_too_short_is_named():
    with pytest.raises(ValueError, match="at least 256 tokens, a note has 5"):
        request(texts={"a note": "short"}).read_by(None, tokenizer())


@pytest.fixture
def typed(tmp_path, monkeypatch, model):
    save_language_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    plan_for(model, NEAR, SLASH).save("plan.json")
    return ["eval", "language-model", "plan.json", "--text", "book.txt"]


def test_the_command_writes_a_report(typed, tmp_path, capsys):
    more = ["--tasks", "one fact", "--lengths", "500,600", "--out", "report"]
    assert cli.run([*typed, *more]) == 0
    shown = capsys.readouterr().out
    assert "1 one fact" in shown and "wrote report/report.html" in shown
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [(row["kind"], row["tokens"]) for row in data["tasks"]] == [
        *(("passkey", 500), ("one fact", 500), ("passkey", 600), ("one fact", 600))
    ]
    assert data["provenance"]["command"].startswith("sparse-dit ")
    assert cli.run([*typed, *more]) == 2, "it is there already"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--prompt", "a cat"], "are for pipelines"),
        (["--steps", "3"], "are for pipelines"),
        (["--tasks", "riddle"], "tasks must be among"),
        (["--lengths", "few"], "--lengths must be whole numbers with commas, got 'few'"),
    ],
)
def test_the_command_says_what_it_does_not_take(typed, more, words, capsys):
    assert cli.run([*typed, *more]) == 2
    assert words in capsys.readouterr().err
