"""Diffusion language models that are measured and shown: prompts, rows, the demo's page, and bad input."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import transformers as T

import sparse_dit
from sparse_dit.cli import run
from sparse_dit.demo import writing
from sparse_dit.denoising import denoising_plan
from sparse_dit.eval.baselines.denoising import Baseline, sparsed_code, streaming_llm, window
from sparse_dit.eval.denoising import ways
from sparse_dit.eval.denoising.frontier import DenoisingFrontier, figure_of, frontier
from sparse_dit.eval.denoising.measure import along_dense
from sparse_dit.eval.denoising.prompts import begun, hidden
from sparse_dit.eval.denoising.writing import Trajectory, Writing
from sparse_dit.inputs import is_denoiser, load_denoiser
from sparse_dit.outputs import Outputs
from tests.denoising.test_rules import call_of
from tests.helpers.tiny_canvases import bytes_writer
from tests.helpers.tiny_language_models import TEXT

WORDS = "A cat has two hats. The dog sleeps in the sun. Nobody knows the number. " * 20
SMALL = Writing(8, 8, 2)


@pytest.fixture(scope="module")
def pipe():
    return bytes_writer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pipe):
    """A pipeline's folder with a text beside it."""
    place = tmp_path_factory.mktemp("dlm")
    pipe.save_pretrained(place)
    pipe.tokenizer.save_pretrained(place / "tokenizer")
    (place / writing.TEXT).write_text(WORDS)
    return place


def test_a_number_is_hidden_once_and_asked_for(pipe):
    prompts = hidden(pipe.tokenizer, "a", WORDS, 300, (0.2, 0.8))
    for prompt in prompts:
        text = pipe.tokenizer.decode(prompt.ids[0])
        assert prompt.answer and text.count(prompt.answer) == 1 and prompt.ids.shape[1] <= 300
        assert text.endswith("What is the pass key? Answer:")
    first, second = (pipe.tokenizer.decode(p.ids[0]).index("pass key is") for p in prompts)
    assert first < 150 < second and prompts[0].answer != prompts[1].answer


@pytest.mark.parametrize(
    ("ask", "match"),
    [
        (lambda t: begun(t, "a", "short", 64), "the text a must have at least 64 tokens, got 5"),
        (lambda t: begun(t, "a", "", 64), "at least 64 tokens, got 0"),
        (lambda t: hidden(t, "a", WORDS, 100, (0.5,)), "a prompt must have at least"),
        (lambda t: hidden(t, "a", "One. Two.", 400, (0.5,)), "too short to hide a pass key"),
    ],
)
def test_a_text_that_is_too_short_is_told(pipe, ask, match):
    with pytest.raises(ValueError, match=match):
        ask(pipe.tokenizer)


def test_what_doesnt_fit_is_told(pipe):
    with pytest.raises(ValueError, match="must fit into the model's 512 tokens, got 520"):
        SMALL.run(pipe, torch.full((1, 510), 5))
    with pytest.raises(ValueError, match="at least one token, got an empty one"):
        SMALL.run(pipe, torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Writing(8, 8, 0)
    out, _ = Writing(24, 8, 1).run(pipe, torch.full((1, 9), 5))
    assert len(out) == 24, "fewer steps than blocks"


def test_a_trajectory_is_equal_to_itself_and_not_to_another(pipe):
    ids = begun(pipe.tokenizer, "a", WORDS, 100).ids
    kept = Trajectory(pipe.mask_token_id, 8)
    with kept.recorded(pipe):
        SMALL.run(pipe, ids)
    assert [len(p) for p in kept.places] == [4, 8, 4] and len(kept.given) == 3
    assert kept.divergence(pipe) == pytest.approx(0, abs=1e-9)
    with ways.METHODS["sliding-window"].way(pipe, 0.3)():
        assert kept.divergence(pipe) > 1e-7


def test_baselines_see_what_they_say():
    call = call_of(0, 1.0)
    for chosen, share in ((window, 0.34), (streaming_llm, 0.5)):
        one = Baseline(share, chosen, 16)
        out = one(call)
        assert 0 < one.computed / one.pairs < share + 0.35
        assert not torch.allclose(out, call.stock(), atol=1e-3)
        whole = Baseline(2.0, chosen, 16)
        torch.testing.assert_close(whole(call), call.stock(), rtol=1e-4, atol=1e-5)
    code = Baseline(0.3, sparsed_code, 16, 0.8)
    assert torch.equal(code(call), call.stock()), "dense first"
    call.context = replace(call.context, sigma=0.5)
    first = code(call)
    assert not torch.allclose(first, call.stock(), atol=1e-3) and code.computed < code.pairs


def test_rows_of_all_methods_and_a_plan(pipe, tmp_path, monkeypatch):
    few = ("online", "sparsed", "sparsed-code", "sliding-window")
    once = {name: replace(ways.METHODS[name], numbers=(0.1,)) for name in few}
    monkeypatch.setattr(ways, "METHODS", once)
    monkeypatch.setattr("sparse_dit.eval.denoising.frontier.METHODS", ways.METHODS)
    plan = denoising_plan(pipe, "online")
    request = DenoisingFrontier(
        texts={"a": WORDS}, tokens=140, writing=SMALL, plans={"mine": plan}, methods=few,
        depths=(0.5,), file=tmp_path / "rows.json",
    )  # fmt: skip
    outputs = Outputs(replace=True, say=lambda _: None)
    outputs.expect("--json", request.file, again=True)
    rows = frontier(pipe, request, lambda _: None, outputs)
    assert [row["method"] for row in rows] == ["mine", *ways.METHODS]
    assert all(0 < row["density"] <= 1 and row["kl"] >= 0 and row["asked"] == 1 for row in rows)
    assert {row["method"] for row in rows if row["kept"]} == {"online", "sparsed"}
    assert {row["method"] for row in rows if row["making"]} == {"online", "sparsed"}
    assert all(row["making"] is None for row in rows if row["method"] == "sliding-window")
    assert frontier(pipe, request, lambda _: None, outputs) == rows, "nothing is done twice"
    other = denoising_plan(pipe, "sparsed")
    other = replace(other, density=plan.density)
    backwards = {"a": WORDS[::-1]}
    for change in ({"texts": backwards}, {"plans": {"mine": other}}, {"depths": (0.2,)}):
        with pytest.raises(ValueError, match="rows of another model, plan or text"):
            replace(request, **change).check(pipe)
    told = request.conditions(pipe)
    model = told["model"]
    weight = pipe.model.model.layers[0].self_attn.v_proj.weight
    monkeypatch.setattr(weight, "data", weight.data + 0.01)
    assert request.conditions(pipe)["weights"] != told["weights"]
    monkeypatch.setattr(pipe.model.config, "hidden_act", "gelu")
    assert request.conditions(pipe)["model"] != model
    assert len(figure_of(rows).axes[0].lines) == len(rows)
    with pytest.raises(ValueError, match="methods must be among"):
        DenoisingFrontier(texts={"a": WORDS}, file=request.file, methods=["flash"])


def test_texts_and_plans_of_one_name_are_told_apart(folder, tmp_path, pipe, monkeypatch):
    once = {"mage": replace(ways.METHODS["mage"], numbers=(0.1,))}
    monkeypatch.setattr(ways, "METHODS", once)
    monkeypatch.setattr("sparse_dit.eval.denoising.frontier.METHODS", once)
    typed = ["eval", "frontier", "--model", str(folder), "--tokens", "140", "--steps", "1"]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "book.txt").write_text(WORDS)
        denoising_plan(pipe, "sparsed").save(tmp_path / name / "plan.json")
        typed += ["--text", str(tmp_path / name / "book.txt")]
        typed += ["--plan", str(tmp_path / name / "plan.json")]
    file = tmp_path / "rows.json"
    assert run([*typed, "--json", str(file)]) == 0
    kept = json.loads(file.read_text())
    files = [str(tmp_path / name / "plan.json") for name in ("a", "b")]
    assert [row["method"] for row in kept["rows"]] == [*files, "mage"]
    assert len(kept["conditions"]["texts"]) == 2 and [*kept["conditions"]["plans"]] == files


def test_what_a_comparison_can_not_do_is_told_before_anything_is_written(
    folder, tmp_path, pipe, capsys
):
    text, file = folder / writing.TEXT, tmp_path / "rows.json"
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    other = bytes_writer().model
    other.model.norm.weight.data[0] = torch.nan
    other.save_pretrained(broken / "model")
    frontier = ["eval", "frontier", "--json", str(file), "--tokens", "140", "--text", str(text)]
    mine = [*frontier, "--model", str(folder)]
    names = "must name each once"
    for typed, words, starts in (
        ([*mine, "--text", str(text)], f"--text {names}", False),
        ([*mine, "--density", "0.3"], "--density don't go with a diffusion language model", False),
        ([*mine, "--height", "64"], "don't go with a diffusion language model", False),
        ([*mine, "--plan", "smollm2-135m-instruct"], "number of heads must be 9", False),
        ([*mine, "--plan", "tiny-wan"], "that LLaDA2Pipeline lacks", False),
        ([*mine, "--steps", "0"], "--steps must be at least 1, got 0", False),
        ([*frontier, "--model", str(broken)], "says of tokens must be numbers, got NaN", True),
    ):
        assert run(typed) == 2
        told = capsys.readouterr().err
        assert words in " ".join(told.split()) and ("dense:" in told) == starts
    assert not file.exists()


@pytest.mark.parametrize(
    "typed",
    [
        ["eval", "MODEL", "PLAN"],
        ["check", "MODEL", "PLAN"],
        ["stability", "MODEL", "--prompt", "a", "--height", "64", "--width", "64"],
        ["plan", "MODEL", "--height", "64", "--width", "64"],
        ["search", "MODEL", "--text", "TEXT", "--text", "PLAN", "--max-kl", "1"],
        ["search", "MODEL/model", "--text", "TEXT", "--text", "PLAN", "--max-kl", "1"],
    ],
)
def test_commands_that_are_for_searched_plans_say_what_is_for_rules(
    folder, tmp_path, pipe, typed, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    plan = tmp_path / "mage.json"
    denoising_plan(pipe, "mage").save(plan)
    given = {"MODEL": str(folder), "PLAN": str(plan), "TEXT": str(folder / writing.TEXT)}
    assert run([re.sub("MODEL|PLAN|TEXT", lambda m: given[m[0]], word) for word in typed]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "is a diffusion language model" in told and "sparse-dit eval frontier --model" in told
    with pytest.raises(NotImplementedError, match="is for videos and images, and LLaDA2Pipeline"):
        sparse_dit.geometric_plan(pipe, density=0.4)
    with pytest.raises(TypeError, match='or take "online"'):
        sparse_dit.patch(pipe, "auto")


def test_a_folder_is_known_and_read(folder, tmp_path, pipe):
    assert is_denoiser(str(folder))
    loaded = load_denoiser(str(folder), "cpu", "float32")
    assert loaded.mask_token_id == pipe.mask_token_id
    pipe.model.save_pretrained(tmp_path / "bare")
    pipe.tokenizer.save_pretrained(tmp_path / "bare")
    assert is_denoiser(str(tmp_path / "bare")) and not is_denoiser("no/folder")
    bare = load_denoiser(str(tmp_path / "bare"), "cpu", "float32")
    assert torch.equal(
        SMALL.run(bare, torch.full((1, 9), 5))[0], SMALL.run(loaded, torch.full((1, 9), 5))[0]
    )
    T.LlamaForCausalLM(T.LlamaConfig(**(TEXT | {"vocab_size": 259}))).save_pretrained(
        tmp_path / "causal"
    )
    pipe.tokenizer.save_pretrained(tmp_path / "causal")
    with pytest.raises(ValueError, match="is a causal language model"):
        load_denoiser(str(tmp_path / "causal"), "cpu", "float32")


def test_the_demo_shows_both_texts_and_what_differs(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "shipped", lambda name: folder)
    monkeypatch.setattr(writing, "QUICK", writing.Size(200, SMALL))
    monkeypatch.setattr(writing, "DEPTHS", (0.5,))
    typed = ["demo", "--model", "dlm", "--quick", "--out", str(tmp_path / "out")]
    assert run(typed) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {"speedup", "density", "token_agreement", "passkey"} <= report.keys()
    assert 0 < report["density"] < 1 and 0 <= report["token_agreement"] <= 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert "http" not in page and all(case["name"] in page for case in report["cases"])
    for case in report["cases"]:
        assert len(case["same"]) == 8 and None not in case["dense_frames"][-1]
        assert None in case["dense_frames"][0]


def test_the_share_of_index_making_is_measured_beside_the_divergence(pipe):
    trajectory = Trajectory(pipe.mask_token_id, 8)
    ids = begun(pipe.tokenizer, "a", WORDS, 256).ids
    with trajectory.recorded(pipe):
        SMALL.run(pipe, ids)
    none = along_dense(trajectory, pipe, ways.METHODS["online"].way(pipe, 1.0)).making
    some = along_dense(trajectory, pipe, ways.METHODS["mage"].way(pipe, 0.1))
    with sparse_dit.patch(pipe, "mage", keep=0.1) as handle:
        making = handle.time_making()
        before = trajectory.divergence(pipe)
        summary = handle.summary()
    assert none == 0 < making.seconds and making.seconds_again > 0
    assert some.making is not None and 0 < some.making < some.seconds
    assert some.divergence == before
    with sparse_dit.patch(pipe, "mage", keep=0.1) as handle:
        assert trajectory.divergence(pipe) == before
        assert handle.summary() == summary, "what is computed once more isn't counted"
