"""The whole search of a plan for a language model, by Python and by the command."""

import json
import re

import pytest
import torch
import transformers

import sparse_dit
from sparse_dit import cli
from sparse_dit.plan import Plan
from sparse_dit.search.front import pick
from sparse_dit.search.language import engine, scoring, search_language_plan
from sparse_dit.search.language.options import LanguageOptions
from tests.helpers.language_plans import DENSE, NEAR, SLASH
from tests.helpers.tiny_language_models import logits, save_language_model, text

transformers.logging.set_verbosity_error()
FEW = (DENSE, NEAR, SLASH)


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch):
    monkeypatch.setattr(engine, "candidates", lambda media: FEW)


@pytest.fixture
def tiny():
    model, inputs = text("llama", batch=2, length=400)
    return model, list(inputs["input_ids"])


def test_a_plan_is_found_that_keeps_the_divergence(tiny):
    model, texts = tiny
    said = []
    want = logits(model, {"input_ids": texts[0][None]})
    plan = sparse_dit.search(model, texts, max_kl=0.05, rows=16, report=said.append)
    assert torch.equal(logits(model, {"input_ids": texts[0][None]}), want), "left as it was"
    assert plan.measured["met"] and plan.measured["kl"] <= 0.05
    assert plan.density < 1 and {head.pattern for head in heads_in(plan)} <= set(FEW)
    assert plan.provenance["objective"] == {"max_kl": 0.05}
    assert plan.provenance["calibration_tokens"] == [400]
    assert any("density" in line for line in said)
    with sparse_dit.patch(model, plan) as handle:
        logits(model, {"input_ids": texts[1][None]})
    assert handle.summary().density == pytest.approx(plan.density, rel=0.2)


def heads_in(plan):
    return [head for heads in plan.components["model"].layers.values() for head in heads[0]]


def test_a_stricter_limit_gives_a_denser_plan(tiny):
    model, texts = tiny
    found = [sparse_dit.search(model, texts, max_kl=kl, rows=16) for kl in (1e-5, 0.5)]
    assert found[0].density > found[1].density
    assert found[0].measured["kl"] <= 1e-5


def test_a_speed_up_that_attention_cannot_give_is_an_error(tiny):
    model, texts = tiny
    with pytest.raises(ValueError, match=r"target_speedup must be at most [\d.]+ for this model"):
        sparse_dit.search(model, texts, target_speedup=50.0, rows=16)


def test_layers_with_a_window_are_left_out():
    model, inputs = text("gemma3", batch=2, length=400)
    plan = sparse_dit.search(model, list(inputs["input_ids"]), max_kl=0.05, rows=16)
    assert list(plan.components["model"].layers) == ["model.layers.1.self_attn"]


def test_a_model_without_causal_order_is_an_error():
    model, inputs = text("llama both ways", batch=2, length=400)
    with pytest.raises(NotImplementedError, match="doesn't attend in plain causal order"):
        sparse_dit.search(model, list(inputs["input_ids"]), max_kl=0.05)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "give one of target_speedup, max_kl, max_ppl_increase, got none"),
        ({"max_kl": 0.1, "target_speedup": 2.0}, "got target_speedup and max_kl"),
        ({"max_kl": 0.0}, "max_kl must be a number above 0, got 0.0"),
        ({"target_speedup": 1.0}, "target_speedup must be a number above 1, got 1.0"),
        ({"max_kl": 0.1, "tokens": 100}, "tokens must be a whole number >= 256, got 100"),
        ({"max_kl": 0.1, "rows": 0}, "rows must be a whole number >= 1, got 0"),
        ({"max_kl": 0.1, "passkey_depths": (1.5,)}, "passkey_depths must be from 0 to 1"),
    ],
)
def test_options_out_of_range(asked, message):
    with pytest.raises(ValueError, match=message):
        LanguageOptions(**asked)


def test_texts_that_do_not_do(tiny):
    model, texts = tiny
    with pytest.raises(ValueError, match="give two texts or more, or held-out ones, got 1"):
        sparse_dit.search(model, texts[:1], max_kl=0.1)
    with pytest.raises(TypeError, match="must be lists of texts"):
        sparse_dit.search(model, "a text", max_kl=0.1)
    with pytest.raises(ValueError, match="a text must have at least 256 tokens, got 9"):
        sparse_dit.search(model, [texts[0], texts[1][:9]], max_kl=0.1)
    for same in ({"held_out": ["another", "a text"]}, {}):
        with pytest.raises(ValueError, match="held-out texts must not be calibration texts"):
            sparse_dit.search(model, ["a text", "a text"], max_kl=0.1, **same)
    with pytest.raises(ValueError, match="a tokenizer must be given"):
        sparse_dit.search(model, ["a text", "another"], max_kl=0.1)
    with (
        sparse_dit.patch(model, "exact"),
        pytest.raises(ValueError, match="the pipeline is patched"),
    ):
        sparse_dit.search(model, texts, max_kl=0.1)


def test_the_command_writes_a_plan(tmp_path, monkeypatch, capsys):
    save_language_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    files = ["--text", "book.txt", "--held-out-text", "other.txt"]
    typed = ["search", "language-model", *files, "--max-kl", "0.05"]
    assert cli.run(typed) == 0
    plan = Plan.load("plan.json")
    assert plan.components["model"].kind == "language_model" and plan.measured["met"]
    assert "wrote plan.json" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["version"] == 3
    assert cli.run(["show", "plan.json", "--front", "--picture", "front.png"]) == 0
    assert "KL" in capsys.readouterr().out
    assert cli.run(["show", "plan.json", "--pick", "density=1", "--out", "dense.json"]) == 0
    assert Plan.load("dense.json").forecast["kl"] == 0.0
    assert cli.run(typed) == 2, "it is there already"
    assert cli.run(["search", "nowhere", "--text", "book.txt", "--max-kl", "1", "--force"]) == 2
    assert "give two texts or more" in capsys.readouterr().err


class Counted:
    """`influences`, interrupted at a call if told to be."""

    def __init__(self, monkeypatch, until=None):
        self.calls, self.until, self.run = 0, until, scoring.influences
        monkeypatch.setattr(scoring, "influences", self)

    def __call__(self, *args, **options):
        self.calls += 1
        if self.calls == self.until:
            raise KeyboardInterrupt
        return self.run(*args, **options)


def test_an_interrupted_search_goes_on_and_another_dial_scores_nothing_anew(tmp_path, monkeypatch):
    model, inputs = text("llama", batch=4, length=400)
    texts, file = list(inputs["input_ids"]), tmp_path / "p.safetensors"
    whole = search_language_plan(model, texts, max_kl=0.05, rows=16)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        Counted(patched, until=3)
        search_language_plan(model, texts, max_kl=0.05, rows=16, profile=file)
    counted, said = Counted(monkeypatch), []
    asked = {"rows": 16, "profile": file, "report": said.append}
    searched = search_language_plan(model, texts, max_kl=0.05, **asked)
    assert counted.calls == 1 and f"{file} holds the scores of 2 of 3 texts" in said
    for layer, modalities in whole.scores.items():
        for modality, scores in modalities.items():
            assert vars(scores).keys() == vars(searched.scores[layer][modality]).keys()
            for name, value in vars(scores).items():
                torch.testing.assert_close(
                    vars(searched.scores[layer][modality])[name], value, rtol=0, atol=0
                )
    plan = sparse_dit.search(model, texts, max_ppl_increase=0.5, **asked)
    assert counted.calls == 1 and plan.measured["met"]


@pytest.mark.parametrize("other", ["rows", "texts", "weights", "layers", "patterns"])
def test_scores_of_something_else_are_refused(other, tiny, tmp_path, monkeypatch):
    model, texts = tiny
    file, rows = tmp_path / "p.safetensors", 16
    sparse_dit.search(model, texts, max_kl=0.05, rows=rows, profile=file)
    before = file.read_bytes()
    if other == "rows":
        rows = 8
    elif other == "texts":
        texts = [texts[0].flip(0), texts[1]]
    elif other == "weights":
        model.model.layers[0].self_attn.q_proj.weight.data *= 1.5
    elif other == "layers":
        del model.model.layers[1:]
        model.config.num_hidden_layers = 1
    else:
        monkeypatch.setattr(engine, "candidates", lambda media: FEW[:2])
    with pytest.raises(
        ValueError, match="is of another model, dtype or version, or of other texts"
    ):
        sparse_dit.search(model, texts, max_kl=0.05, rows=rows, profile=file)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "broken", [b"", b"no file of tensors", "cut", "other format", "other count"]
)
def test_a_file_without_scores_is_refused(broken, tiny, tmp_path):
    model, texts = tiny
    file = tmp_path / "p.safetensors"
    sparse_dit.search(model, texts, max_kl=0.05, rows=16, profile=file)
    data, words = file.read_bytes(), "damaged, or no profile"
    if broken == "cut":
        broken = data[: len(data) // 2]
    elif broken == "other format":
        broken = data.replace(b"language scores 1", b"language scores 0")
        words = "not a profile of this version ('sparse_dit language scores 1')"
    elif broken == "other count":
        broken = data.replace(b'"done\\": 1', b'"done\\": 9')
        assert broken != data
        words = "it says that 9 texts are scored"
    file.write_bytes(broken)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        sparse_dit.search(model, texts, max_kl=0.05, rows=16, profile=file)
    assert "\n" not in str(error.value)


def test_the_command_goes_on_after_ctrl_c(tmp_path, monkeypatch, capsys):
    save_language_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    typed = [
        "search",
        "language-model",
        "--text",
        "book.txt",
        "--text",
        "other.txt",
        "--max-kl",
        "1",
    ]
    with monkeypatch.context() as patched:
        Counted(patched, until=2)
        assert cli.run([*typed, "--held-out-text", "third.txt"]) == 2, "there is none"
        (tmp_path / "third.txt").write_text((tmp_path / "book.txt").read_text()[::-1])
        typed += ["--held-out-text", "third.txt"]
        assert cli.run(typed) == 130
    assert "the same command goes on from plan.profile.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()
    counted = Counted(monkeypatch)
    assert cli.run(typed) == 0
    said = capsys.readouterr()
    assert "holds the scores of 1 of" in said.err and counted.calls > 0
    assert "the profile is kept in plan.profile.safetensors" in said.out


def test_broken_weights_are_told_as_such(tmp_path, monkeypatch, tiny, capsys):
    folder = save_language_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    model, texts = tiny
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="LlamaForCausalLM says of tokens must be numbers, got Na"):
        sparse_dit.search(model, texts, max_kl=0.1)
    model.save_pretrained(folder)
    rows = ["--text", "book.txt", "--tokens", "400", "--method", "mminference", "--json", "r.json"]
    assert cli.run(["eval", "frontier", "--model", str(folder), *rows]) == 2
    assert "must be numbers, got NaN" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    "typed",
    [
        ["serve", "MODEL"],
        ["check", "MODEL", "tiny-wan"],
        ["plan", "MODEL", "--height", "64", "--width", "64"],
        ["eval", "frontier", "--model", "MODEL", "--json", "rows.json"],
    ],
)
def test_commands_for_pipelines_say_which_take_a_language_model(
    typed, tmp_path, monkeypatch, capsys
):
    folder = save_language_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.run([str(folder) if word == "MODEL" else word for word in typed]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"{folder} is a language model" in told and "with --text FILE" in told


def test_other_points_of_a_search(tiny):
    model, texts = tiny
    searched = search_language_plan(model, texts, max_kl=0.05, rows=16)
    plan, front = searched.plan, searched.front
    assert [p.speedup for p in front.points] == sorted(p.speedup for p in front.points)
    if searched.choice.loss > 0:  # what was measured scales what is forecast
        measured = searched.choice.loss * searched.kl_of_loss
        assert measured == pytest.approx(plan.measured["kl"], abs=1e-5)
    own = next(p for p in front.points if p.density == plan.density)
    assert own.kl == pytest.approx(plan.measured["kl"], abs=1e-5)
    fastest = pick(plan, front, "kl", 100.0)
    assert fastest.forecast["speedup"] == front.points[-1].speedup
    assert fastest.measured == {} and fastest.components["model"].kind == "language_model"
    with sparse_dit.patch(model, fastest) as handle:
        logits(model, {"input_ids": texts[1][None]})
    assert handle.summary().density == pytest.approx(fastest.density, rel=0.2)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--text", "book.txt", "--max-kl", "1", "--prompt", "a cat"], "are for pipelines"),
        (["--text", "book.txt", "--max-kl", "1", "--height", "64"], "are for pipelines"),
        (["--text", "book.txt", "--min-psnr", "30"], "are for pipelines"),
        (["--prompt", "a cat", "--max-kl", "1"], "are for language models"),
        (["--prompt", "a cat", "--tokens", "512"], "are for language models"),
    ],
)
def test_options_of_the_other_kind_of_model_are_refused(typed, message, capsys):
    assert cli.run(["search", "anything", *typed]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
